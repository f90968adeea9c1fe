"""`python -m training.lora`: teaches `icons` a style by an adapter (LoRA, Hu et al. 2021), from 200 drawings.

It starts from the shipped weights (`restore.py`), draws neon tubes (`icons/neon.py`), and trains what peft adds to the
layers of the denoiser; everything else stays as it is. The server takes the result as it takes any other
(docs/adapters.md). Minutes on two cores; a run that was stopped goes on from its checkpoint.

Mixed precision, gradient checkpointing and several processes are options of accelerate, diffusers and torch. They do
not change what is trained on: each step has the same drawings and the same noise, whatever their number and kind.
`--measure` prints the speed and the memory of each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safelight_server.export.adapters import target_names
from safelight_server.export.options import AdapterLayers
from torch import Tensor, nn

from training import checkpoint, networks, parallel
from training.icons import Spec, caption, held_out, sample_spec
from training.icons.render import NEON, Style, render

CHECKPOINT = "lora.pt"
FACTS = "training.json"
"""Beside an adapter: what it was trained on, and how."""
CHECKPOINT_EVERY_S = 60.0
LOG_EVERY = 25
NAME = "neon"
WARM_STEPS, MEASURED_STEPS = 2, 8


@dataclass(frozen=True, slots=True)
class LoraRecipe:
    """What an adapter is trained on, and how long.

    Attributes:
        wordings: captions of each drawing, one of which is drawn for each sample.
        batch_size: samples of a step, of all processes together.
        layers: those that are trained, as `safelight export --adapter-layers` names them.
        learning_rate: reached after a twentieth of the steps, then falling to zero along a cosine.
    """

    seed: int = 21
    style: Style = field(default=NEON)
    num_drawings: int = 200
    wordings: int = 8
    caption_dropout: float = 0.1
    rank: int = 4
    layers: AdapterLayers = AdapterLayers.ALL
    batch_size: int = 32
    learning_rate: float = 2e-3
    num_samples: int = 12_000

    @property
    def num_steps(self) -> int:
        """Steps of the optimizer."""
        return self.num_samples // self.batch_size

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1.0, 0.05 * self.num_steps))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))


@dataclass(frozen=True, slots=True)
class Options:
    """How the training is computed."""

    processes: int = 1
    bfloat16: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        precision = "bfloat16" if self.bfloat16 else "float32"
        more = ", gradient checkpointing" if self.checkpointing else ""
        return f"{precision}{more}, {self.processes} process{'es' if self.processes > 1 else ''}"


LORA = LoraRecipe()


def drawn_specs(recipe: LoraRecipe) -> list[Spec]:
    """What the drawings show; no triple that the evaluation asks for."""
    rng = random.Random(f"lora/{recipe.seed}")
    specs: list[Spec] = []
    while len(specs) < recipe.num_drawings:
        spec = sample_spec(rng)
        if not held_out(spec.object, spec.colour, spec.background):
            specs.append(spec)
    return specs


class Samples:
    """The drawings as latents, and their captions as the text encoder's states. A step's batch is fixed by its number.

    Args:
        folder: the diffusers folder of `icons`.
    """

    def __init__(self, recipe: LoraRecipe, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        self._recipe = recipe
        specs, rng = drawn_specs(recipe), random.Random(f"captions/{recipe.seed}")
        pictures = np.stack([render(spec, style=recipe.style) for spec in specs]).astype(np.float32) / 127.5 - 1
        with np.load(folder / "encoder.npz") as arrays:
            weight, bias = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"])
        images = torch.from_numpy(pictures.transpose(0, 3, 1, 2))
        latents = nn.functional.conv2d(images, weight, bias, stride=weight.shape[-1])
        self._latents = latents * pipeline.vae.config.scaling_factor
        texts = ["", *(caption(spec, rng) for spec in specs for _ in range(recipe.wordings))]
        cut = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = pipeline.tokenizer(texts, max_length=pipeline.tokenizer.model_max_length, **cut).input_ids
        with torch.no_grad():
            parts = [pipeline.text_encoder(input_ids=part).last_hidden_state for part in ids.split(256)]
        self._states = torch.cat(parts)
        self._alphas = pipeline.scheduler.alphas_cumprod

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a step: noisy latents (B, C, h, w), timesteps (B,), text states (B, T, D), v (B, C, h, w)."""
        recipe, count = self._recipe, self._recipe.batch_size
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        picks = torch.randint(recipe.num_drawings, (count,), generator=generator)
        texts = 1 + picks * recipe.wordings + torch.randint(recipe.wordings, (count,), generator=generator)
        texts[torch.rand(count, generator=generator) < recipe.caption_dropout] = 0
        timesteps = torch.randint(len(self._alphas), (count,), generator=generator)
        clean = self._latents[picks]
        noise = torch.randn(clean.shape, generator=generator)
        signal = self._alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self._alphas[timesteps]).sqrt()[:, None, None, None]
        return signal * clean + sigma * noise, timesteps, self._states[texts], signal * noise - sigma * clean


class Run:
    """One process of a training."""

    def __init__(self, recipe: LoraRecipe, options: Options, folder: Path, rank: int) -> None:
        world = options.processes
        if world > 1:  # accelerate takes the group that `parallel` has made
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update({name: str(value) for name, value in own.items()}, OMP_NUM_THREADS="1")
        self.recipe, self.options, self.rank, self.world = recipe, options, rank, world
        networks.seed_everything(recipe.seed)
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16" if options.bfloat16 else "no")
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        self.samples = Samples(recipe, pipeline, folder)
        self.unet: UNet2DConditionModel = pipeline.unet.requires_grad_(False).train()
        targets = target_names(self.unet, recipe.layers)
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=targets, init_lora_weights="gaussian")
        self.unet.add_adapter(config)
        if options.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.weights = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.model, self.optimizer = self.accelerator.prepare(
            self.unet, torch.optim.AdamW(self.weights, lr=0.0, weight_decay=0.0)
        )
        self.step, self.cpu_s = 0, 0.0

    def advance(self) -> float:
        """One step; its loss in this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        noisy, timesteps, states, wanted = (part[self.rank :: self.world] for part in self.samples.at(self.step))
        predicted = self.model(noisy, timesteps, states, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), wanted)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def adapter(self) -> dict[str, Tensor]:
        """The weights of the adapter, by peft's names."""
        found: dict[str, Tensor] = get_peft_model_state_dict(self.unet, adapter_name="default")
        return found

    def state(self) -> dict[str, object]:
        """All that `restore` needs."""
        return {
            "recipe": _said(self.recipe),
            "adapter": self.adapter(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "cpu_s": self.cpu_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint, also one of other options.

        Raises:
            SystemExit: it is of another recipe.
        """
        if state["recipe"] != _said(self.recipe):
            raise SystemExit("the checkpoint is of another recipe: remove it, or choose another folder")
        set_peft_model_state_dict(self.unet, state["adapter"], adapter_name="default")
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.cpu_s = state["step"], state["cpu_s"]


def _said(recipe: LoraRecipe) -> dict[str, object]:
    """A recipe as a checkpoint keeps it."""
    return asdict(recipe) | {"style": repr(recipe.style), "layers": str(recipe.layers)}


def train(recipe: LoraRecipe, options: Options, pipeline: Path, folder: Path, rank: int, world: int) -> None:
    """Trains up to `recipe.num_samples`; rank 0 writes log, checkpoints, and with each the adapter, `folder / NAME`."""
    run = Run(recipe, options, pipeline, rank)
    if (state := checkpoint.load(folder / CHECKPOINT)) is not None:
        run.restore(state)
        print(f"rank {rank}: resuming at step {run.step}", flush=True)
    losses: list[float] = []
    counted, saved = time.process_time(), time.monotonic()
    while run.step < recipe.num_steps:
        losses.append(run.advance())
        now = time.process_time()
        run.cpu_s, counted = run.cpu_s + world * (now - counted), now
        if rank:
            continue
        if run.step % LOG_EVERY == 0 or run.step == recipe.num_steps:
            _log(folder, run, float(np.mean(losses)))
            losses.clear()
        if time.monotonic() - saved > CHECKPOINT_EVERY_S or run.step == recipe.num_steps:
            save(run, folder / NAME)  # first, so that a run that its checkpoint says to be done has its adapter
            checkpoint.save(folder / CHECKPOINT, run.state())
            saved = time.monotonic()


def _log(folder: Path, run: Run, loss: float) -> None:
    line = {"samples": run.step * run.recipe.batch_size, "loss": round(loss, 4), "cpu_s": round(run.cpu_s)}
    print(json.dumps(line), flush=True)
    with (folder / "lora.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def save(run: Run, folder: Path) -> None:
    """Writes the adapter as diffusers does, in float16, and `FACTS` beside it."""
    facts = run.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name: weight.detach().half().contiguous() for name, weight in run.adapter().items()},
        unet_lora_adapter_metadata={
            name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()
        },
    )
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library lets its owner alone read it
    recipe = run.recipe
    told = {
        "samples": run.step * recipe.batch_size,
        "num_samples": recipe.num_samples,
        "num_drawings": recipe.num_drawings,
        "rank": recipe.rank,
        "layers": recipe.layers,
        "cpu_s": round(run.cpu_s),
        "computed": str(run.options),
    }
    (folder / FACTS).write_text(json.dumps(told, indent=1) + "\n")


def measure(recipe: LoraRecipe, options: Options, pipeline: Path, folder: Path, rank: int, world: int) -> None:
    """Takes a few steps; writes their time, and the most memory that the process had meanwhile."""
    run = Run(recipe, options, pipeline, rank)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
    before = _memory("VmRSS")
    for _ in range(WARM_STEPS):
        run.advance()
    began, cpu = time.monotonic(), time.process_time()
    for _ in range(MEASURED_STEPS):
        run.advance()
    num = MEASURED_STEPS * recipe.batch_size
    found = {
        "samples_per_s": num / (time.monotonic() - began),
        "cpu_ms": world * 1e3 * (time.process_time() - cpu) / num,
        "peak_mib": _memory("VmHWM") / 1024,
        "before_mib": before / 1024,
    }
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))


def _memory(name: str) -> int:
    """A figure of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def compare(recipe: LoraRecipe, pipeline: Path, folder: Path) -> list[tuple[Options, dict[str, float]]]:
    """Measures all options together and alone; the figures of the process that is first."""
    one = Options(bfloat16=networks.has_bfloat16())
    several = [Options(), Options(checkpointing=True), one, replace(one, checkpointing=True)]
    several += [replace(options, processes=2) for options in several]
    found = []
    for options in dict.fromkeys(several):
        parallel.start(measure, (recipe, options, pipeline, folder), folder, options.processes, "fork")
        figures = json.loads((folder / "measured-0.json").read_text())
        print(f"{options}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()), flush=True)
        found.append((options, figures))
    return found


def table(found: Sequence[tuple[Options, Mapping[str, float]]]) -> str:
    """The figures of `compare` in Markdown, for docs/training.md."""
    heads = ["", "samples a second", "CPU ms a sample", "most memory of a process", "of it for the steps"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for options, one in found:
        steps_mib = one["peak_mib"] - one["before_mib"]
        cells = (
            f"{one['samples_per_s']:.0f}",
            f"{one['cpu_ms']:.1f}",
            f"{one['peak_mib']:.0f} MiB",
            f"{steps_mib:.0f} MiB",
        )
        lines.append(f"| {' | '.join([str(options), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("out/restored/icons"), help="of training.restore")
    parser.add_argument("--folder", type=Path, default=Path("out/lora"), help="work and results")
    parser.add_argument("--samples", type=int, default=LORA.num_samples, help="samples in all")
    parser.add_argument("--rank", type=int, default=LORA.rank, help="of the adapter")
    parser.add_argument(
        "--layers", type=AdapterLayers, choices=list(AdapterLayers), default=LORA.layers, help="that are trained"
    )
    parser.add_argument("--batch-size", type=int, default=LORA.batch_size, help="samples of a step")
    parser.add_argument("--processes", type=int, default=2, help="single-thread processes")
    parser.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16" if networks.has_bfloat16() else "float32"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--measure", action="store_true", help="only print speed and memory of the options")
    options = parser.parse_args()
    if options.processes < 1 or options.batch_size % options.processes or not options.batch_size:
        parser.error("--batch-size must be a multiple of --processes")
    chosen = {"rank": options.rank, "layers": options.layers, "batch_size": options.batch_size}
    recipe = replace(LORA, num_samples=options.samples, **chosen)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.measure:
        print(table(compare(recipe, options.pipeline, options.folder)))
        return
    how = Options(options.processes, options.precision == "bfloat16", options.gradient_checkpointing)
    began = time.monotonic()
    parallel.start(train, (recipe, how, options.pipeline, options.folder), options.folder, how.processes)
    print(f"{options.folder / NAME}: {how}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
