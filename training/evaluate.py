"""`python -m training.evaluate`: measures how well the pictures of the shipped weights agree with their captions.

A classifier, trained on new drawings and first checked on others, judges pictures
that are generated for captions whose combination of object, colour and background
was not in the training data; `copies.py` checks whether they are copies. Exits
with 1 if a score is below its bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safelight_server.catalog import revisions

from training import classifier, copies
from training.icons import Spec, caption, held_out, sample_spec
from training.sample import Sampler

BARS = {"object": 0.95, "colour": 0.95, "background": 0.97}
JUDGE_BAR = 0.99
NUM_CAPTIONS = 500
NUM_REAL = 2000
COPIES_BAR = 0.02
"""Largest allowed share of pictures nearer to a training drawing than 99 % of held-out drawings; theirs is 0.01."""


def held_out_specs(count: int, seed: str) -> list[Spec]:
    """Specs whose combination of object, colour and background is not in the training data."""
    rng = random.Random(seed)
    specs: list[Spec] = []
    while len(specs) < count:
        spec = sample_spec(rng)
        if held_out(spec.object, spec.colour, spec.background):
            specs.append(spec)
    return specs


def shares(wanted: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> dict[str, float]:
    """Share of right answers by head; both arrays are (N, heads)."""
    right = (wanted == found).mean(axis=0)
    return {name: round(float(share), 4) for name, share in zip(classifier.HEADS, right, strict=True)}


def below_bars(scores: Mapping[str, float], copied: float) -> list[str]:
    """The scores that are below their bars, as messages."""
    faults = [f"{name} {scores[name]:.3f} < {bar}" for name, bar in BARS.items() if not scores[name] >= bar]
    return faults if copied <= COPIES_BAR else [*faults, f"copies {copied:.3f} > {COPIES_BAR}"]


def digest() -> str:
    """Digest of the sources that decide the classifier: if one changes, it must be trained again."""
    here = Path(__file__).parent
    sources = [*sorted((here / "icons").glob("*.py")), here / "classifier.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def find_manifest(models: Path, name: str, revision: str | None) -> Path:
    """The manifest of a revision; without a revision the newest, as in the server."""
    found = list(models.glob(f"pipelines/{name}/{revision or '*'}/pipeline.json"))
    if not found:
        sys.exit(f"no {name} of revision {revision or 'any'} in {models / 'pipelines'}")
    return max(found, key=lambda path: revisions.order(path.parent.name))


def trained_judge(folder: Path) -> tuple[classifier.Classifier, dict[str, float]]:
    """The classifier, trained or loaded from the folder, and its shares of right answers on real drawings."""
    judge = classifier.train(folder / f"classifier-{digest()}.pt")
    real, truth = classifier.draw(NUM_REAL, "real")
    on_real = shares(truth.numpy(), classifier.predict(judge, classifier.shrink(real)))
    low = {name: on_real[name] for name in BARS if on_real[name] < JUDGE_BAR}
    if low:
        sys.exit(f"the judge is below {JUDGE_BAR} on real drawings, {low}: its verdict would mean nothing")
    return judge, on_real


def measure(manifest: Path, captions: int, out: Path) -> dict[str, object]:
    """Generates pictures, judges them and looks for copies; writes result.json and pictures.png to `out`."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    judge, on_real = trained_judge(out)
    print(f"the judge on {NUM_REAL} real drawings: {on_real}", flush=True)

    sampler = Sampler(manifest, classifier.cores())
    specs = held_out_specs(captions, "evaluation")
    rng = random.Random("captions")
    prompts = [caption(spec, rng, full=True) for spec in specs]
    pictures = list(sampler.pictures(prompts, range(len(prompts))))
    print(f"{len(pictures)} pictures after {time.monotonic() - began:.0f} s", flush=True)
    wanted = np.array([classifier.labels(spec) for spec in specs])
    found = classifier.predict(judge, classifier.shrink(np.stack(pictures)))
    scores = shares(wanted, found)
    near = copies.nearness(pictures, held_out_specs(1000, "reference")).rounded()
    result = {
        "pipeline": f"{sampler.manifest['name']}/{sampler.manifest['revision']}",
        "sha256": {role: file["sha256"] for role, file in sampler.manifest["components"].items()},
        "settings": sampler.manifest["defaults"],
        "captions": len(prompts),
        "judge_on_real_drawings": on_real,
        "scores": scores,
        "copies": near,
        "bars": BARS | {"copies": COPIES_BAR},
        "faults": below_bars(scores, near["share_below"]),
        "confused": confused(wanted, found),
        "wrong": wrong(prompts, wanted, found),
        "seconds": round(time.monotonic() - began),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet(pictures[:64]).save(out / "pictures.png")
    return result


def wrong(prompts: Sequence[str], wanted: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> dict[str, list[str]]:
    """The first thirty mistakes of each head: what was drawn instead of what."""
    lists: dict[str, list[str]] = {}
    for at, (name, values) in enumerate(classifier.HEADS.items()):
        off = np.flatnonzero(wanted[:, at] != found[:, at])[:30]
        lists[name] = [f"{prompts[i]}: {values[found[i, at]]}" for i in off]
    return lists


def confused(wanted: npt.NDArray[np.int64], found: npt.NDArray[np.int64], most: int = 6) -> list[str]:
    """The most frequent mistakes of the heads that have a bar, such as "gold as yellow 13"."""
    pairs: Counter[str] = Counter()
    for at, (name, values) in enumerate(classifier.HEADS.items()):
        if name in BARS:
            off = np.flatnonzero(wanted[:, at] != found[:, at])
            pairs.update(f"{values[wanted[i, at]]} as {values[found[i, at]]}" for i in off)
    return [f"{pair} {count}" for pair, count in pairs.most_common(most)]


def sheet(pictures: Sequence[npt.NDArray[np.uint8]], columns: int = 16) -> Image.Image:
    """Pictures of one size in rows; an incomplete last row is filled with black."""
    blank = [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    grid = np.stack([*pictures, *blank]).reshape(-1, columns, *pictures[0].shape)
    return Image.fromarray(np.concatenate(np.concatenate(grid, axis=1), axis=1))


def table(result: Mapping[str, object]) -> Table:
    """A table of the scores with their bars."""
    shown = Table(title=f"{result['pipeline']}, {result['captions']} held-out captions")
    for heading in ("", "generated", "real drawings", "bar"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for name, share in result["scores"].items():
        bar = f"{BARS[name]:.2f}" if name in BARS else "reported"
        shown.add_row(f"right {name}", f"{share:.3f}", f"{result['judge_on_real_drawings'][name]:.3f}", bar)
    shown.add_row("nearer to training than 99 % of unseen", f"{result['copies']['share_below']:.3f}", "0.010", "0.020")
    return shown


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="where pipelines/ is")
    parser.add_argument("--name", default="icons", help="of the pipeline")
    parser.add_argument("--revision", help="to score; without it the newest")
    parser.add_argument("--captions", type=int, default=NUM_CAPTIONS, help="held-out captions")
    parser.add_argument("--out", type=Path, default=Path("out/evaluate"), help="where results go")
    options = parser.parse_args()
    if options.captions < 1:
        parser.error("--captions must be at least 1")
    torch.set_num_threads(classifier.cores())
    result = measure(find_manifest(options.models, options.name, options.revision), options.captions, options.out)
    Console(width=100).print(table(result))
    print("\n".join(result["faults"]) or "above all bars", f"({result['seconds']} s; {options.out}/result.json)")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
