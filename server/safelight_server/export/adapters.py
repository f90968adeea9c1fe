"""Gives a denoiser room for adapters (LoRA, Hu et al. 2021): each row of a batch brings its own, as inputs.

A target, which is a linear layer or a convolution, adds what
`catalog.manifest.AdapterRoom` says. A row is multiplied by its own matrices alone,
so its bits do not depend on what other rows bring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from safelight_server.export.plan import AdapterLayers

ATTENTION_PARTS = ("to_q", "to_k", "to_v", "to_out.0")
"""What the training scripts of diffusers and peft change."""
IMAGE_PROMPT_PARTS = ("to_k_ip", "to_v_ip")
"""The layers of an IP-Adapter (`ip_adapter.py`): no file of a LoRA has them."""


def target_names(denoiser: nn.Module, layers: AdapterLayers) -> list[str]:
    """The names of the layers of a UNet that get room, in the order of the network."""
    of_attention, of_blocks = set(), set()
    for name, module in denoiser.named_modules():
        if isinstance(module, Attention):
            of_attention |= {f"{name}.{part}" for part in ATTENTION_PARTS}
        if isinstance(module, Transformer2DModel):
            of_blocks |= {f"{name}.{part}" for part, _ in module.named_modules()}
    wanted = {AdapterLayers.ATTENTION: of_attention, AdapterLayers.BLOCKS: of_attention | of_blocks}.get(layers)
    return [
        name
        for name, module in denoiser.named_modules()
        if _has_room(module) and (wanted is None or name in wanted) and not name.endswith(IMAGE_PROMPT_PARTS)
    ]


def _has_room(module: nn.Module) -> bool:
    """Whether a layer is of a kind that adapters change. UNets of diffusers have no other convolutions."""
    if not isinstance(module, nn.Conv2d):
        return isinstance(module, nn.Linear)
    is_plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return is_plain and all(len(set(pair)) == 1 for pair in (module.kernel_size, module.stride, module.padding))


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

    def of(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of target `number`: down (B, R, inputs), up (B, R, outputs), and the scales (B, 1, R)."""
        assert self._scales is not None, "see `given`"
        return self._pieces[2 * number], self._pieces[2 * number + 1], self._scales


class AdaptedLinear(nn.Module):
    """A linear layer, and what the adapters of each row add to it."""

    def __init__(self, base: nn.Linear, given: GivenAdapters, number: int) -> None:
        super().__init__()
        self.base = base
        self._given = given
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, outputs), or without T, as the timestep's embedding has none."""
        own: Tensor = self.base(x)
        down, up, scales = self._given.of(self._number)
        tokens = x if x.ndim == 3 else x.unsqueeze(1)
        added = torch.matmul(torch.matmul(tokens, down.transpose(1, 2)) * scales, up)
        return own + (added if x.ndim == 3 else added.squeeze(1))


class AdaptedConvolution(nn.Module):
    """A convolution, and what the adapters of each row add to it: a convolution to R channels, then one of 1 x 1."""

    def __init__(self, base: nn.Conv2d, given: GivenAdapters, number: int) -> None:
        super().__init__()
        self.base = base
        self._given = given
        self._number = number

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h', w')."""
        own: Tensor = self.base(x)
        down, up, scales = self._given.of(self._number)
        rows, inputs, height, width = x.shape
        ranks = down.shape[1]
        of_places = torch.matmul(down.reshape(rows, -1, inputs), x.flatten(2))
        seen = self._gathered(of_places.reshape(rows, -1, height, width), ranks)
        added = torch.matmul(up.transpose(1, 2), seen.flatten(2) * scales.transpose(1, 2))
        return own + added.reshape(own.shape)

    def _gathered(self, of_places: Tensor, ranks: int) -> Tensor:
        """Adds up what each pixel gives to each place of the kernel: (B, R * k * k, h, w) -> (B, R, h', w').

        First the channels become few, then the pixels are moved: the other way round each pixel would be copied k * k
        times with all of its channels. A convolution whose numbers are 0 and 1 moves them, at any stride and size.
        """
        edge, stride, padding = self.base.kernel_size[0], self.base.stride, self.base.padding
        if edge == 1 and stride == (1, 1) and padding == (0, 0):
            return of_places
        places = edge * edge
        moves = torch.eye(places, dtype=of_places.dtype, device=of_places.device).reshape(1, places, edge, edge)
        moves = moves.expand(ranks, -1, -1, -1).contiguous()
        return functional.conv2d(of_places, moves, stride=stride, padding=padding, groups=ranks)


class Adapters:
    """The targets of a denoiser, in which it is changed to take adapters.

    Args:
        names: of the layers, as `target_names` gives them; the order is that of their numbers.

    Attributes:
        given: what a call's rows bring.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        found = [(name, denoiser.get_submodule(name)) for name in names]
        self._targets = [_target(name, layer) for name, layer in found]
        self.given = GivenAdapters([size for target in self._targets for size in _sizes(target)])
        for number, (name, layer) in enumerate(found):
            parent, _, last = name.rpartition(".")
            adapted = AdaptedConvolution if isinstance(layer, nn.Conv2d) else AdaptedLinear
            setattr(denoiser.get_submodule(parent), last, adapted(layer, self.given, number))

    def room(self, max_rank: int) -> dict[str, Any]:
        """What the manifest says of them (`AdapterRoom`)."""
        return {"max_rank": max_rank, "targets": self._targets}

    @property
    def width(self) -> int:
        """Q of `AdapterRoom`."""
        return sum(size for target in self._targets for size in _sizes(target))

    def examples(self, max_rank: int, rows: int) -> dict[str, Tensor]:
        """Adapters of the size of trained ones, by the names of the inputs that take them; another one in each row."""
        generator = torch.Generator().manual_seed(1)
        return {
            "adapter_weights": 0.1 * torch.randn(rows, max_rank, self.width, generator=generator),
            "adapter_scales": torch.rand(rows, max_rank, generator=generator),
        }


def _target(name: str, layer: nn.Module) -> dict[str, Any]:
    """What the manifest says of a layer (`AdapterTarget`)."""
    if isinstance(layer, nn.Linear):
        return {"name": name, "inputs": layer.in_features, "outputs": layer.out_features}
    assert isinstance(layer, nn.Conv2d)
    form = {"kernel": layer.kernel_size[0], "stride": layer.stride[0], "padding": int(layer.padding[0])}
    return {"name": name, "inputs": layer.in_channels, "outputs": layer.out_channels} | form


def _sizes(target: dict[str, Any]) -> tuple[int, int]:
    """How many numbers of a rank are those of its matrix A, and of its B."""
    return target["inputs"] * target.get("kernel", 1) ** 2, target["outputs"]


@contextlib.contextmanager
def given(adapters: Adapters | None, weights: Tensor | None, scales: Tensor | None) -> Iterator[None]:
    """A block in which a denoiser is changed by the adapters of its call's rows; without room for them, by none."""
    if adapters is None:
        yield
        return
    assert weights is not None and scales is not None
    adapters.given.begin(weights, scales)
    try:
        yield
    finally:
        adapters.given.end()
