"""Data-parallel training in single-threaded processes: each takes a share of the batch; gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

RENDEZVOUS = "rendezvous"


def start(function: Callable[..., None], arguments: tuple[object, ...], folder: Path, world: int) -> None:
    """Runs `function(*arguments, rank, world)` in `world` processes until all have ended; they rendezvous in `folder`.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; the others were ended.
    """
    (folder / RENDEZVOUS).unlink(missing_ok=True)
    torch.multiprocessing.start_processes(_run, (function, arguments, folder, world), world, start_method="spawn")


def _run(rank: int, function: Callable[..., None], arguments: tuple[object, ...], folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # listen on loopback only
        place = f"file://{(folder / RENDEZVOUS).resolve()}"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    function(*arguments, rank, world)
    if world > 1:  # else gloo's threads are ended with the process, which at times aborts; after an error others wait
        dist.destroy_process_group()


def average_gradients(module: nn.Module, world: int) -> None:
    """Replaces each process' gradients with the mean of all processes'."""
    if world == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
