"""`python -m training.evaluate`: how well the shipped weights draw what they are asked for.

A classifier trained on fresh drawings, itself checked on real ones first,
looks at pictures generated for captions whose object, colour and background
were never trained on together. Exits 1 below the bars.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from training import classifier
from training.icons import Spec, caption, held_out, render, sample_spec
from training.sample import Sampler

BARS = {"object": 0.95, "colour": 0.95, "background": 0.97}
JUDGE_BAR = 0.99
JUDGED_HEADS = ("object", "colour", "background")
NUM_CAPTIONS = 500
NUM_REAL = 2000
NUM_TRAINING = 20_000
COPIES_BAR = 0.05
"""Share of pictures that may lie nearer to a training drawing than 99 % of held-out drawings do."""
FEATURE_PX = 16


def held_out_specs(count: int, seed: str) -> list[Spec]:
    """Specs whose triple was never trained on."""
    rng = random.Random(seed)
    specs: list[Spec] = []
    while len(specs) < count:
        spec = sample_spec(rng)
        if held_out(spec.object, spec.colour, spec.background):
            specs.append(spec)
    return specs


def shares(wanted: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> dict[str, float]:
    """Share of right answers by head; (N, heads) each."""
    right = (wanted == found).mean(axis=0)
    return {name: round(float(share), 4) for name, share in zip(classifier.HEADS, right, strict=True)}


def below_bars(scores: dict[str, float], copies: float) -> list[str]:
    """What is not good enough."""
    faults = [f"{name} {scores[name]:.3f} < {bar}" for name, bar in BARS.items() if scores[name] < bar]
    return faults + ([f"copies {copies:.3f} > {COPIES_BAR}"] if copies > COPIES_BAR else [])


def features(images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Small colour pictures as vectors: (N, 16 * 16 * 3)."""
    small = [Image.fromarray(image).resize((FEATURE_PX, FEATURE_PX), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small])


def nearest(queries: npt.NDArray[np.float32], known: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Euclidean distance of each query to the nearest of `known`."""
    squares = (known**2).sum(axis=1)
    distances = [np.sqrt(np.maximum((squares - 2 * known @ q + q @ q).min(), 0)) for q in queries]
    return np.array(distances, np.float32)


def copies(pictures: Sequence[npt.NDArray[np.uint8]]) -> float:
    """Share of pictures nearer to one of 20,000 training drawings than the 1st percentile of held-out drawings."""
    rng = random.Random("nearest")
    training = []
    while len(training) < NUM_TRAINING:
        spec = sample_spec(rng)
        if not held_out(spec.object, spec.colour, spec.background):
            training.append(render(spec, 2 * FEATURE_PX))
    known = features(training)
    reference = [render(spec, 2 * FEATURE_PX) for spec in held_out_specs(1000, "reference")]
    limit = np.percentile(nearest(features(reference), known), 1)
    return float((nearest(features(pictures), known) < limit).mean())


def digest() -> str:
    """Of all that decides the classifier."""
    here = Path(__file__).parent
    sources = [*sorted((here / "icons").glob("*.py")), here / "classifier.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="where pipelines/ is")
    parser.add_argument("--name", default="icons", help="of the pipeline; its newest revision is scored")
    parser.add_argument("--captions", type=int, default=NUM_CAPTIONS, help="held-out captions")
    parser.add_argument("--out", type=Path, default=Path("out/evaluate"), help="where results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)

    judge = classifier.train(options.out / f"classifier-{digest()}.pt")
    real, truth = classifier.draw(NUM_REAL, "real")
    on_real = shares(truth.numpy(), classifier.predict(judge, classifier.shrink(real)))
    print(f"the judge on {NUM_REAL} real drawings: {on_real}", flush=True)
    if min(on_real[name] for name in JUDGED_HEADS) < JUDGE_BAR:
        sys.exit(f"the judge is below {JUDGE_BAR}: its verdict would mean nothing")

    manifest = sorted(options.models.glob(f"pipelines/{options.name}/*/pipeline.json"))[-1]
    sampler = Sampler(manifest)
    specs = held_out_specs(options.captions, "evaluation")
    rng = random.Random("captions")
    prompts = [caption(spec, rng, full=True) for spec in specs]
    pictures = list(sampler.pictures(prompts, range(len(prompts))))
    wanted = np.array([classifier.labels(replace(spec)) for spec in specs])
    found = classifier.predict(judge, classifier.shrink(np.stack(pictures)))
    scores = shares(wanted, found)
    copied = round(copies(pictures), 4)
    faults = below_bars(scores, copied)
    result = {
        "pipeline": f"{options.name}/{sampler.manifest['revision']}",
        "captions": len(prompts),
        "judge_on_real_drawings": on_real,
        "scores": scores,
        "copies": copied,
        "bars": BARS | {"copies": COPIES_BAR},
        "wrong": wrong(prompts, wanted, found),
        "seconds": round(time.monotonic() - began),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    _sheet(pictures[:64], options.out / "pictures.png")
    print(f"{result['pipeline']} on {len(prompts)} held-out captions: {scores}, copies {copied}", flush=True)
    print("\n".join(faults) or "above all bars")
    sys.exit(1 if faults else 0)


def wrong(prompts: Sequence[str], wanted: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> dict[str, list[str]]:
    """What was drawn in place of what, by head, the first thirty."""
    lists: dict[str, list[str]] = {}
    for at, (name, values) in enumerate(classifier.HEADS.items()):
        off = np.flatnonzero(wanted[:, at] != found[:, at])[:30]
        lists[name] = [f"{prompts[i]}: {values[found[i, at]]}" for i in off]
    return lists


def _sheet(pictures: Sequence[npt.NDArray[np.uint8]], path: Path, columns: int = 16) -> None:
    rows = [np.concatenate(pictures[at : at + columns], axis=1) for at in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(path)


if __name__ == "__main__":
    main()
