"""Processes that train together leave their group before they end."""

from __future__ import annotations

import atexit
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training import parallel


def _notes_its_end(folder: Path, rank: int, world: int) -> None:
    """Writes at the end of the process whether it is still of a group."""
    atexit.register(lambda: (folder / f"{rank}.txt").write_text(str(dist.is_initialized())))
    assert dist.is_initialized() == (world > 1)


def _fails_in_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("the second of them fails")
    dist.barrier()


@pytest.mark.parametrize("world", (1, 2))
def test_no_process_ends_within_its_group(tmp_path: Path, world: int) -> None:
    """gloo's threads, ended with the process in place of the group, aborted one start in four."""
    parallel.start(_notes_its_end, (tmp_path,), tmp_path, world)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.txt")} == {
        f"{rank}.txt": "False" for rank in range(world)
    }


def test_the_failure_of_one_ends_all(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the second of them fails"):
        parallel.start(_fails_in_one, (), tmp_path, 2)
