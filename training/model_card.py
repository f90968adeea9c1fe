"""`python -m training.model_card`: writes MODEL_CARD.md beside a manifest, from the figures of real runs.

How it was trained comes from `training.json`, which the training writes and the
exporter copies beside the manifest; its scores come from `result.json`, which the
evaluation writes. An evaluation of other weights is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from training.evaluate import BARS, COPIES_BAR, find_manifest
from training.icons import BACKGROUNDS, COLOURS, OBJECTS
from training.recipe import RECIPE

ROUNDS = 40

CARD = """\
# {name}, revision {revision}

{description}: {width} x {height} pixels, from English captions of a small domain.
Weights: {license}, {mebibytes:.1f} MiB in all (float16 on disk, float32 arithmetic).

## Data

Drawn by this project (`training/icons`), from a seed; no other picture, text or model went in. {num_objects} objects,
{num_colours} colours and materials, {num_backgrounds} backgrounds, each perhaps of crystal, glowing, outlined,
sparkling or tilted. Triples with sha256(object, colour, background) mod 20 = 0 were never trained on; the evaluation
asks for those alone.

Objects: {objects}.

Colours: {colours}. Backgrounds: {backgrounds}.

## Recipe

Stable Diffusion's classes in small (`CLIPTextModel`, `UNet2DConditionModel`, `AutoencoderTiny`), {prediction_type},
{latent} latents{zero_snr}. Every number is in `training/recipe.py`; `make train` trains
such a model from the seed, for {recipe_samples:,} samples, and scores it.

{recipe}

## Evaluation

{captions} held-out captions at the default settings ({steps} steps of {sampler}, guidance {guidance}), judged by a
classifier of fresh drawings.

| right | generated | the judge on real drawings | bar |
|---|---|---|---|
{scores}

Copies: {below:.1%} of the pictures lie nearer to one of 20,000 training drawings than 99 % of unseen drawings do (bar
{copies_bar:.0%}, unseen drawings 1 %); median distance {median:.2f}, of unseen drawings {held_out_median:.2f}.

{verdict}

## Limits

It knows the words above and no others: an unknown word gives some known icon. One object a picture, one size, one
style. Not for anything that needs to be right about the world. Most often drawn as something else: {confused}.
"""


def card(
    manifest: Mapping[str, Any], trained: Mapping[str, Any], result: Mapping[str, Any], num_bytes: int, cheaper: float
) -> str:
    """Renders the card; `cheaper` is the time of the decoder over that of the preview decoder, 0 if there is none."""
    size, latent, defaults = manifest["sizes"][0], manifest["latent"], manifest["defaults"]
    near = result["copies"]
    return CARD.format(
        name=manifest["name"],
        revision=manifest["revision"],
        description=manifest["description"],
        license=manifest["license"],
        width=size["width_px"],
        height=size["height_px"],
        mebibytes=num_bytes / 2**20,
        num_objects=len(OBJECTS),
        num_colours=len(COLOURS),
        num_backgrounds=len(BACKGROUNDS),
        objects=", ".join(OBJECTS),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        prediction_type=manifest["prediction_type"].replace("_", "-"),
        latent=" x ".join(str(latent[key]) for key in ("channels", "height", "width")),
        zero_snr=" and zero terminal SNR" if manifest["noise_schedule"]["rescale_zero_terminal_snr"] else "",
        recipe="\n".join(_recipe(trained, cheaper)),
        recipe_samples=RECIPE.diffusion_samples,
        captions=result["captions"],
        steps=defaults["num_inference_steps"],
        sampler=defaults["sampler"]["name"],
        guidance=defaults["guidance_scale"],
        scores="\n".join(_scores(result)),
        below=near["share_below"],
        copies_bar=COPIES_BAR,
        median=near["median"],
        held_out_median=near["held_out_median"],
        confused="; ".join(result["confused"]) or "nothing",
        verdict="All bars are met." if not result["faults"] else f"Below the bars: {'; '.join(result['faults'])}.",
    )


def _recipe(trained: Mapping[str, Any], cheaper: float) -> list[str]:
    lines = [
        f"- Diffusion: {trained['samples']:,} samples, {trained['diffusion_cpu_s'] / 3600:.2f} cpu hours."
        + (f" {trained['note']}" if "note" in trained else ""),
    ]
    names = {"linear_preview": "Linear preview", "preview_decoder": "Preview decoder", "decoder": "Decoder"}
    if cheaper:
        lines.append(f"- The preview decoder takes {cheaper:.1f} times less than the decoder, on one core, one row.")
    return lines + [
        f"- {names[key]}: {value:.2f} dB PSNR on icons it was not fitted to, at its own resolution."
        for key, value in trained["psnr_db"].items()
    ]


def _scores(result: Mapping[str, Any]) -> list[str]:
    real = result["judge_on_real_drawings"]
    return [
        f"| {name} | {share:.3f} | {real[name]:.3f} | {BARS.get(name, 'reported')} |"
        for name, share in result["scores"].items()
    ]


def times_cheaper(files: Mapping[str, Path], latent: Mapping[str, int]) -> float:
    """Time of the decoder over that of the preview decoder: medians of thread time, measured in turns."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {role: onnxruntime.InferenceSession(files[role], options) for role in ("decoder", "preview_decoder")}
    row = np.random.default_rng(0).standard_normal(
        (1, latent["channels"], latent["height"], latent["width"]), np.float32
    )
    spent: dict[str, list[float]] = {role: [] for role in sessions}
    for _ in range(ROUNDS):
        for role, session in sessions.items():
            began = time.thread_time()
            session.run(None, {"latent": row})
            spent[role].append(time.thread_time() - began)
    return float(np.median(spent["decoder"]) / np.median(spent["preview_decoder"]))


def read(path: Path) -> dict[str, Any]:
    """Reads a JSON file; exits with a message if it does not exist."""
    if not path.is_file():
        sys.exit(f"{path} is missing: a card has only figures that were measured")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="where pipelines/ is")
    parser.add_argument("--name", default="icons", help="of the pipeline")
    parser.add_argument("--revision", help="without it the newest")
    parser.add_argument("--result", type=Path, default=Path("out/evaluate/result.json"), help="of training.evaluate")
    options = parser.parse_args()
    path = find_manifest(options.models, options.name, options.revision)
    manifest, trained, result = read(path), read(path.parent / "training.json"), read(options.result)
    if result["sha256"] != {role: file["sha256"] for role, file in manifest["components"].items()}:
        sys.exit(f"{options.result} is of other weights than {path}: evaluate them first")
    files = {
        role: options.models / "repository" / file["model"] / str(file["version"]) / "model.onnx"
        for role, file in manifest["components"].items()
    }
    num_bytes = sum(file.stat().st_size for file in files.values())
    cheaper = times_cheaper(files, manifest["latent"]) if "preview_decoder" in files else 0.0
    target = path.parent / "MODEL_CARD.md"
    target.write_text(card(manifest, trained, result, num_bytes, cheaper))
    print(target)


if __name__ == "__main__":
    main()
