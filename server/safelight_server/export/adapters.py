"""Gives a network room for adapters (LoRA, Hu et al. 2021): each row of a batch brings its own, as inputs.

The layers that trainers change, linear ones and convolutions, add what
`catalog.manifest.AdapterRoom` says. A row is multiplied by its own matrices alone,
so its bits do not depend on what other rows bring.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from safelight_server.catalog.manifest import AdapterRoom
from safelight_server.export.options import AdapterLayers
from safelight_server.export.source import ExportError

ATTENTION_PARTS = ("to_q", "to_k", "to_v", "to_out.0")
"""What the training scripts of diffusers and peft change in a UNet."""
IMAGE_PROMPT_PARTS = ("to_k_ip", "to_v_ip")
"""The layers of an IP-Adapter (`ip_adapter.py`): no file of a LoRA has them."""
TRANSFORMER_BLOCKS = (FluxTransformerBlock, FluxSingleTransformerBlock, JointTransformerBlock, ZImageTransformerBlock)
TRANSFORMER_ATTENTION = re.compile(r"\.(attn2?|attention)\.")
"""Stands in the names of the layers of a transformer's attention."""

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""What adapters add to a target's output: of its input, and the down parts, up parts and factors of the rows."""


def target_names(denoiser: nn.Module, layers: AdapterLayers) -> list[str]:
    """The names of the layers that get room, in the order of the network.

    Of a UNet all layers can have some; of a transformer the linear layers of its blocks, of which "attention" chooses.
    """
    blocks = tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, TRANSFORMER_BLOCKS))
    if not blocks:
        return _of_unet(denoiser, layers)
    found = [name for name, at in denoiser.named_modules() if isinstance(at, nn.Linear) and name.startswith(blocks)]
    return [name for name in found if layers is not AdapterLayers.ATTENTION or TRANSFORMER_ATTENTION.search(name)]


def _of_unet(denoiser: nn.Module, layers: AdapterLayers) -> list[str]:
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

    def add(self, number: int, x: Tensor, own: Tensor, product: Product) -> Tensor:
        """What target `number` makes of its input x (B, ...), `own` (B, ...), and what adapters add to it.

        A row that brings no adapter keeps its bits: nothing is added to it, and of a call without such rows nothing
        computed.
        """
        if self._scales is None:
            return own
        down, up = self._pieces[2 * number], self._pieces[2 * number + 1]
        if self._rows is None:
            return own + product(x, down, up, self._scales)
        return own.index_add_(0, self._rows, product(x[self._rows], down, up, self._scales))


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
        return self._given.add(self._number, x, own, self._product)

    def _product(self, x: Tensor, down: Tensor, up: Tensor, scales: Tensor) -> Tensor:
        tokens = x.unsqueeze(1) if x.ndim == 2 else x
        added = torch.matmul(_scaled(torch.matmul(tokens, down.transpose(1, 2)), scales), up)
        return added.squeeze(1) if x.ndim == 2 else added


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
        return self._given.add(self._number, x, own, self._product)

    def _product(self, x: Tensor, down: Tensor, up: Tensor, scales: Tensor) -> Tensor:
        rows, inputs, height, width = x.shape
        ranks = down.shape[1]
        of_places = torch.matmul(down.reshape(rows, -1, inputs), x.flatten(2))
        seen = self._gathered(of_places.reshape(rows, -1, height, width), ranks)
        added = torch.matmul(up.transpose(1, 2), _scaled(seen.flatten(2), scales.transpose(1, 2)))
        return added.unflatten(2, seen.shape[2:])

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


def _scaled(products: Tensor, scales: Tensor) -> Tensor:
    """Products times the factors of their ranks, in the type of the products; the factors are float32."""
    scaled = products * scales
    return scaled if scaled.dtype == products.dtype else scaled.to(products.dtype)


def _layer(network: nn.Module, name: str) -> nn.Module | None:
    """A layer that can have room; None where the network has no such."""
    try:
        found = network.get_submodule(name)
    except AttributeError:
        return None
    return found if _has_room(found) else None


class Adapters:
    """The targets of a network, in which it is changed to take adapters.

    Args:
        names: of the layers, as `target_names` gives them; the order is that of their numbers.

    Attributes:
        given: what a call's rows bring.

    Raises:
        ExportError: a name is no layer that adapters can change.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        found = []
        for name in names:
            if (layer := _layer(network, name)) is None:
                raise ExportError(f"adapters: {name} is no layer of the network that adapters can change")
            found.append((name, layer))
        self._targets = [_target(name, layer) for name, layer in found]
        self.given = GivenAdapters([size for target in self._targets for size in _sizes(target)])
        for number, (name, layer) in enumerate(found):
            parent, _, last = name.rpartition(".")
            adapted = AdaptedConvolution if isinstance(layer, nn.Conv2d) else AdaptedLinear
            setattr(network.get_submodule(parent), last, adapted(layer, self.given, number))

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


def fitting(denoiser: nn.Module, room: AdapterRoom) -> Adapters:
    """A denoiser's targets as a manifest names them; the denoiser is changed.

    Raises:
        ExportError: the denoiser has other layers.
    """
    made = Adapters(denoiser, [target.name for target in room.targets])
    own = AdapterRoom.model_validate(made.room(room.max_rank))
    for target, layer in zip(room.targets, own.targets, strict=True):
        if target != layer:
            raise ExportError(
                f"adapters: {target.name} is {target.form} in pipeline.json; it is {layer.form} in the denoiser"
            )
    return made


@contextlib.contextmanager
def given(
    adapters: Adapters | None, weights: Tensor | None, scales: Tensor | None, rows: Tensor | None = None
) -> Iterator[None]:
    """A block in which a network is changed by the adapters of its call's rows.

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
