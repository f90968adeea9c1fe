"""Builds control networks (ControlNet, Zhang et al. 2023) into a denoiser: each runs for the rows that use it alone.

In the ONNX file of the denoiser a network is a branch of an `If`: without a row that
uses it nothing of it is computed; else it is given those rows, and what it adds to
all others is 0. So a row's bits do not depend on what the rows beside it use. The
torch modules here do the same; the file is compared with them, and the `torch` runtime
runs them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from safelight_server.export import fusion
from safelight_server.export.adapters import Adapters
from safelight_server.export.components import Denoiser, DenoiserXL
from safelight_server.export.fusion import PICTURE, SCALE
from safelight_server.export.onnx_file import Inputs, exported, free_axes, move_weights, num_values, save, stored

CONDITIONS = ("sample", "timestep", "encoder_hidden_states")
ADDED_CONDITIONS = ("text_embeds", "time_ids")
"""The inputs of a denoiser that its control networks are given too; these of SDXL alone."""
IMAGES, SCALES = "control_images", "control_scales"


class ControlNetwork(nn.Module):
    """Conditions, control_image (B, 3, H, W) in [0, 1], control_scale (B,) -> D + 1 tensors that are added to a UNet.

    D are for the skip connections of the UNet's down blocks, the last one is for its middle.
    """

    def __init__(self, model: ControlNetModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control_image: Tensor,
        control_scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        down, middle = self.model(
            sample, timestep, encoder_hidden_states, control_image, added_cond_kwargs=added, return_dict=False
        )
        scale = control_scale[:, None, None, None]
        if middle.dtype != scale.dtype:
            scale = scale.to(middle.dtype)
        return tuple(residual * scale for residual in (*down, middle))


class GivenResiduals(threading.local):
    """What is added in the call under way. No module: torch must not take it for state of the network.

    Each thread has its own, because the instances of the `torch` runtime share a network.
    """

    def __init__(self) -> None:
        self.tensors: Sequence[Tensor] = ()

    @contextlib.contextmanager
    def held(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """A block in which these are added."""
        self.tensors = tensors
        try:
            yield
        finally:
            self.tensors = ()


class ControllableUNet(nn.Module):
    """A UNet to whose skip connections and middle the given residuals are added."""

    def __init__(self, unet: nn.Module, given: GivenResiduals) -> None:
        super().__init__()
        self.unet = unet
        self._given = given

    def forward(self, *inputs: Tensor, **named: object) -> tuple[Tensor, ...]:
        """As the UNet's."""
        more: dict[str, object] = {}
        if self._given.tensors:
            *down, middle = self._given.tensors
            more = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        result: tuple[Tensor, ...] = self.unet(*inputs, **more, **named)
        return result


class ControlledDenoiser(nn.Module):
    """A denoiser with its control networks.

    Beside the denoiser's own inputs control_images (B, K, 3, H, W) in [0, 1] and control_scales (B, K), for K networks.

    Args:
        denoiser: is changed.
        networks: in the order of their places.
    """

    outputs = ("prediction",)

    def __init__(self, denoiser: Denoiser | DenoiserXL, networks: Sequence[ControlNetModel]) -> None:
        super().__init__()
        self.given = GivenResiduals()
        self.denoiser = denoiser
        denoiser.model = ControllableUNet(denoiser.model, self.given)
        self.networks = nn.ModuleList(ControlNetwork(network) for network in networks)

    @property
    def adapters(self) -> Adapters | None:
        """Those that the denoiser takes."""
        return self.denoiser.adapters

    def forward(self, control_images: Tensor, control_scales: Tensor, **own: Tensor) -> Tensor:
        """`own`: the inputs of the denoiser itself. A network runs for the rows whose scale is not 0."""
        sums: list[Tensor] = []
        for place, network in enumerate(self.networks):
            rows = control_scales[:, place].nonzero()[:, 0]
            if not len(rows):
                continue
            given = {name: own[name][rows] for name in (*CONDITIONS, *ADDED_CONDITIONS) if name in own}
            added = network(**conditions(given, control_images[rows, place], control_scales[rows, place]))
            if not sums:
                sums = [tensor.new_zeros(len(control_scales), *tensor.shape[1:]) for tensor in added]
            for sum_, tensor in zip(sums, added, strict=True):
                sum_.index_add_(0, rows, tensor)
        with self.given.held(sums):
            prediction: Tensor = self.denoiser(**own)
        return prediction

    def examples(self, own: Inputs, factor: int) -> dict[str, Tensor]:
        """Example inputs with those of `own`; all networks act in all rows.

        Args:
            factor: pixels of a picture along one edge of a latent's pixel.
        """
        rows, _, height, width = own["sample"].shape
        generator, count = torch.Generator().manual_seed(2), len(self.networks)
        images = torch.rand(rows, count, 3, factor * height, factor * width, generator=generator)
        return {**own, IMAGES: images, SCALES: 0.5 + torch.rand(rows, count, generator=generator)}


class ResidualDenoiser(nn.Module):
    """The denoiser of a `ControlledDenoiser` without its networks: what they add is an input."""

    def __init__(self, controlled: ControlledDenoiser, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = controlled.denoiser
        self._given = controlled.given
        self._names = names

    def forward(self, own: tuple[Tensor, ...], residuals: tuple[Tensor, ...]) -> Tensor:
        """`own`: the denoiser's inputs in the order of `names`."""
        with self._given.held(residuals):
            prediction: Tensor = self.denoiser(**dict(zip(self._names, own, strict=True)))
        return prediction


def conditions(own: Inputs, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The inputs of a `ControlNetwork`, in its order."""
    common = {name: own[name] for name in CONDITIONS}
    return {**common, PICTURE: image, SCALE: scale, **{name: own[name] for name in ADDED_CONDITIONS if name in own}}


def idle(example: Inputs) -> list[dict[str, Tensor]]:
    """Examples like one, in which no network acts, and in which some act in one of two rows."""
    scales = example[SCALES]
    part = scales.clone()
    part[1] = 0
    part[0, 1:] = 0
    return [{**example, SCALES: torch.zeros_like(scales)}, {**example, SCALES: part}]


def write_controlled(module: ControlledDenoiser, examples: Sequence[Inputs], path: Path, multiple: int) -> Path | None:
    """Writes a denoiser with its control networks as one ONNX file, as `onnx_file.write_onnx` writes others.

    Args:
        examples: of `ControlledDenoiser.examples`, one for each size.

    Returns:
        The file with the weights, if they are many.
    """
    name, parts = path.parent.parent.name, [_parts(module, example) for example in examples]
    largest = max(range(len(examples)), key=lambda at: num_values(examples[at]))
    names = [f"{fusion.RESIDUAL}{number}" for number in range(len(parts[0][2]))]
    own = [part[0] for part in parts]
    # of one value, so that the graph takes no size from them: where no network acts they are a single 0
    residuals = tuple(tensor[:1, :1, :1, :1] for tensor in parts[largest][2])
    denoiser = exported(
        ResidualDenoiser(module, list(own[0])),
        {"own": tuple(own[largest].values()), "residuals": residuals},
        [*own[0], *names],
        module.outputs,
        {"own": tuple(free_axes(own, multiple).values()), "residuals": ({},) * len(residuals)},
        name,
    )
    of_network = [part[1] for part in parts]
    axes_of_network = free_axes(of_network, _multiples(of_network, own, multiple))
    networks = [
        exported(network, of_network[largest], list(of_network[0]), names, axes_of_network, name)
        for network in module.networks
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    programs = [denoiser, *networks]
    data = move_weights([program.model for program in programs], path)
    whole, *branches = [stored(program) for program in programs]
    save(fusion.fused(whole, branches, IMAGES, SCALES, _picture(examples)), path)
    return data


def _picture(examples: Sequence[Inputs]) -> list[int | str]:
    """(3, H, W) of the pictures; a name where the examples differ."""
    sizes = zip(*(example[IMAGES].shape[2:] for example in examples), strict=True)
    names = ("channels", "picture_height", "picture_width")
    return [size[0] if len(set(size)) == 1 else name for name, size in zip(names, sizes, strict=True)]


def _parts(module: ControlledDenoiser, example: Inputs) -> tuple[Inputs, Inputs, Sequence[Tensor]]:
    """The inputs of the denoiser itself, those of a network, and what a network adds."""
    own = {name: tensor for name, tensor in example.items() if name not in (IMAGES, SCALES)}
    given = conditions(own, example[IMAGES][:, 0].contiguous(), example[SCALES][:, 0].contiguous())
    return own, given, module.networks[0](**given)


def _multiples(examples: Sequence[Inputs], own: Sequence[Inputs], multiple: int) -> dict[str, int]:
    """What the free axes of each input are multiples of, where those of a latent are multiples of `multiple`."""
    edge = int(own[0]["sample"].shape[2])
    return {
        name: max(1, multiple * int(tensor.shape[2]) // edge)
        for name, tensor in examples[0].items()
        if tensor.ndim == 4
    }
