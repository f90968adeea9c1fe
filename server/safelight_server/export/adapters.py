"""Gives a denoiser room for adapters (LoRA, Hu et al. 2021): each row of a batch brings its own, as inputs.

The layers that trainers change add what `catalog.manifest.AdapterRoom` says: of a
UNet the attention's linear layers, of a transformer all linear layers of its blocks.
A row is multiplied by its own matrices alone, so its bits do not depend on what other
rows bring.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.export.source import ExportError

PARTS = ("to_q", "to_k", "to_v", "to_out.0")
"""The targets in an Attention of a UNet."""
BLOCKS = (FluxTransformerBlock, FluxSingleTransformerBlock, JointTransformerBlock, ZImageTransformerBlock)
"""The blocks of transformers, all of whose linear layers are targets."""


class GivenAdapters(threading.local):
    """What the rows of the call under way bring. No module: torch must not take it for state of the network.

    Each thread has its own, because the instances of the `torch` runtime share a network.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._pieces: tuple[Tensor, ...] = ()
        self._scales: Tensor | None = None
        self._rows: Tensor | None = None

    def begin(self, weights: Tensor, scales: Tensor, rows: Tensor | None = None) -> None:
        """Takes the adapters of a call's rows: (B, R, Q) and (B, R).

        Args:
            rows: (A,), the places in the batch of the rows that bring adapters, where there are not all of them; the
                other arguments are of these rows alone.
        """
        self._pieces, self._scales = weights.split(self._sizes, dim=2), scales.unsqueeze(1)
        self._rows = rows

    def end(self) -> None:
        """Lets go of them."""
        self._pieces, self._scales, self._rows = (), None, None

    def add(self, number: int, x: Tensor, own: Tensor) -> Tensor:
        """What target `number` makes of its input (B, T, inputs), `own` (B, T, outputs), and what adapters add to it.

        The axis T is absent where a layer has one input a row: a timestep's embedding, which scales and shifts. A row
        that brings no adapter keeps its bits: nothing is added to it, and of a call without such rows nothing computed.
        """
        if self._scales is None:
            return own
        if self._rows is None:
            return own + self._added(number, x)
        return own.index_add_(0, self._rows, self._added(number, x[self._rows]))

    def _added(self, number: int, x: Tensor) -> Tensor:
        down, up = self._pieces[2 * number], self._pieces[2 * number + 1]
        tokens = x.unsqueeze(1) if x.ndim == 2 else x
        scaled = torch.matmul(tokens, down.transpose(1, 2)) * self._scales  # float32, as the factors are
        if scaled.dtype != up.dtype:
            scaled = scaled.to(up.dtype)
        added = torch.matmul(scaled, up)
        return added.squeeze(1) if x.ndim == 2 else added


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
        return self._given.add(self._number, x, own)


def layers_of(denoiser: nn.Module) -> list[str]:
    """The names of the linear layers that adapters can change."""
    modules = dict(denoiser.named_modules())
    blocks = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BLOCKS))
    if blocks:
        return [name for name, module in modules.items() if isinstance(module, nn.Linear) and name.startswith(blocks)]
    return [f"{name}.{part}" for name, module in modules.items() if isinstance(module, Attention) for part in PARTS]


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    """A linear layer of a module; None where it has no such."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


class Adapters:
    """The targets of a denoiser, in which it is changed to take adapters.

    Args:
        names: of the targets, in their order; None: all layers that adapters can change.

    Attributes:
        given: what a call's rows bring.

    Raises:
        ExportError: a name is no linear layer of the denoiser.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str] | None = None) -> None:
        found = []
        for name in layers_of(denoiser) if names is None else names:
            if (layer := _linear(denoiser, name)) is None:
                raise ExportError(f"adapters: {name} is no linear layer of the denoiser")
            found.append((name, layer))
        self._targets = [(name, layer.in_features, layer.out_features) for name, layer in found]
        self.given = GivenAdapters([size for _, *sizes in self._targets for size in sizes])
        for number, (name, layer) in enumerate(found):
            parent, _, last = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), last, AdaptedLinear(layer, self.given, number))

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


def fitting(denoiser: nn.Module, room: AdapterRoom) -> Adapters:
    """A denoiser's targets as a manifest names them; the denoiser is changed.

    Raises:
        ExportError: the denoiser has other layers.
    """
    made = Adapters(denoiser, [target.name for target in room.targets])
    own = AdapterRoom.model_validate(made.room(room.max_rank))
    for target, layer in zip(room.targets, own.targets, strict=True):
        if target != layer:
            sizes = f"{target.inputs} to {target.outputs} in pipeline.json; it is {layer.inputs} to {layer.outputs}"
            raise ExportError(f"adapters: {target.name} is {sizes}")
    return made


@contextlib.contextmanager
def given(
    adapters: Adapters | None, weights: Tensor | None, scales: Tensor | None, rows: Tensor | None = None
) -> Iterator[None]:
    """A block in which a denoiser is changed by the adapters of its call's rows.

    Without room for them, or where no row brings any (`weights` is None), it is changed by none.

    Args:
        rows: as those of `GivenAdapters.begin`.
    """
    if adapters is None or weights is None:
        yield
        return
    assert scales is not None
    adapters.given.begin(weights, scales, rows)
    try:
        yield
    finally:
        adapters.given.end()
