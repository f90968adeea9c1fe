"""Gives a network room for adapters (LoRA, Hu et al. 2021): each row of a batch brings its own, as inputs.

The attention's linear layers (`to_q`, `to_k`, `to_v`, `to_out.0`, the targets of
diffusers' and peft's training scripts) add what `catalog.manifest.AdapterRoom`
says. A row is multiplied by its own matrices alone, so its bits do not depend on
what other rows bring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

PARTS = ("to_q", "to_k", "to_v", "to_out.0")


class GivenAdapters:
    """What the rows of the call under way bring. No module: torch must not take it for state of the network."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._pieces: tuple[Tensor, ...] = ()
        self._scales: Tensor | None = None

    def begin(self, weights: Tensor, scales: Tensor) -> None:
        """Takes the adapters of a call's rows: (B, R, Q) and (B, R)."""
        self._pieces, self._scales = weights.split(self._sizes, dim=2), scales.unsqueeze(1)

    def end(self) -> None:
        """Lets go of them."""
        self._pieces, self._scales = (), None

    def add(self, number: int, x: Tensor) -> Tensor:
        """What the adapters add to target `number` for its input (B, T, inputs): (B, T, outputs)."""
        down, up = self._pieces[2 * number], self._pieces[2 * number + 1]
        return torch.matmul(torch.matmul(x, down.transpose(1, 2)) * self._scales, up)


class AdaptedLinear(nn.Module):
    """A linear layer, and what the adapters of each row add to it."""

    def __init__(self, base: nn.Linear, given: GivenAdapters, number: int) -> None:
        super().__init__()
        self.base = base
        self._given = given
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, outputs)."""
        own: Tensor = self.base(x)
        return own + self._given.add(self._number, x)


def target_names(denoiser: nn.Module) -> list[str]:
    """The names of the layers of a UNet that get room."""
    return [
        f"{name}.{part}" for name, module in denoiser.named_modules() if isinstance(module, Attention) for part in PARTS
    ]


class Adapters:
    """The targets of a network, in which it is changed to take adapters.

    Args:
        names: of the layers; the order is that of their numbers.

    Attributes:
        given: what a call's rows bring.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        found = [(name, network.get_submodule(name)) for name in names]
        self._targets = [(name, layer.in_features, layer.out_features) for name, layer in found]
        self.given = GivenAdapters([size for _, *sizes in self._targets for size in sizes])
        for number, (name, layer) in enumerate(found):
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, AdaptedLinear(layer, self.given, number))

    def room(self, max_rank: int) -> dict[str, Any]:
        """What the manifest says of them (`AdapterRoom`)."""
        targets = [{"name": name, "inputs": inputs, "outputs": outputs} for name, inputs, outputs in self._targets]
        return {"max_rank": max_rank, "targets": targets}

    @property
    def width(self) -> int:
        """Q of `AdapterRoom`."""
        return sum(inputs + outputs for _, inputs, outputs in self._targets)

    def examples(self, max_rank: int, rows: int) -> dict[str, Tensor]:
        """Adapters of the size of trained ones, by the names of the inputs that take them; another one in each row."""
        generator = torch.Generator().manual_seed(1)
        return {
            "adapter_weights": 0.1 * torch.randn(rows, max_rank, self.width, generator=generator),
            "adapter_scales": torch.rand(rows, max_rank, generator=generator),
        }


@contextlib.contextmanager
def given(adapters: Adapters | None, weights: Tensor | None, scales: Tensor | None) -> Iterator[None]:
    """A block in which a network is changed by the adapters of its call's rows; without room for them, by none."""
    if adapters is None:
        yield
        return
    assert weights is not None and scales is not None
    adapters.given.begin(weights, scales)
    try:
        yield
    finally:
        adapters.given.end()
