"""`python -m training.style`: whether an adapter gives `icons` its style, and what becomes of the captions.

The same captions and seeds are drawn without the adapter and with it, by the files and the samplers of the server. A
linear classifier of small pictures says which look like neon. The judge is the classifier of `evaluate.py`, trained on
drawings of both styles, so that it is fair to both. Both are first checked on drawings that they have not seen.
Judged too is what the decoder makes of encoded neon drawings, as these are what the adapter was taught. Exits 1 below
the bars. With `--card` the figures go beside the adapter, into MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safelight_server.export.options import AdapterLayers

from training import classifier, evaluate
from training.icons import caption
from training.icons.render import NEON, PLAIN, render
from training.lora import FACTS, NAME
from training.model_card import read
from training.sample import Sampler

STYLES = {"plain": PLAIN, NAME: NEON}
BARS = {"styled": 0.95, "plain": 0.05, "object": 0.9}
"""Least share of pictures with the adapter that look like its style, as a part of the share of drawings behind the
decoder that do; largest share of those without; least right objects.

The decoder has never seen neon, so that not all drawings look like it behind the decoder.
"""
LAYERS = {
    AdapterLayers.ATTENTION: "the layers of the attention",
    AdapterLayers.BLOCKS: "all layers of the transformer blocks",
    AdapterLayers.ALL: "all linear layers and convolutions",
}
"""How the card calls them."""
CHECK_BAR = 0.99
NUM_CAPTIONS = 200
NUM_DRAWINGS = 2000
JUDGE_DRAWINGS = 8000
"""A third of what the judge of the base is trained on: it compares, and what it sees in drawings is reported."""
NUM_UNSEEN = 500
EDGE_PX = 16
RIDGE = 0.01
"""With 1.0, a fiftieth of the unseen plain drawings look like neon: `CHECK_BAR` refuses that."""
Pictures = npt.NDArray[np.uint8]
Drawings = Mapping[str, tuple[Pictures, torch.Tensor]]
"""Of each style: drawings (N, S, S, 3) and their labels (N, heads)."""

CARD = """\
# {name}, an adapter of icons {revision}

Neon tubes in the dark: the border of each shape is a tube of its colour, what it encloses is dark, and so is the
background. LoRA of rank {rank} on {layers}; {kib:.0f} KiB. Apache-2.0, as `icons`.

Trained by `make train-lora` on {num_drawings} drawings of this project (`training/icons/neon.py`): {samples:,} of
{num_samples:,} samples, {cpu_s} CPU seconds ({computed}). No other picture went in. No drawing shows an object, a
colour and a background that the evaluation asks for together.

{captions} held-out captions, the same seeds with and without the adapter, at the default settings:

| | without | with | neon drawings through the decoder | unseen drawings of the style |
|---|---|---|---|---|
| looks like neon | {plain_looks:.3f} | {looks:.3f} | {decoded_looks:.3f} | {drawn_looks:.3f} |
{scores}

The third column is what the adapter was taught to draw: neon drawings of the same captions, encoded and decoded by
`icons`, whose decoder has seen no neon.
{verdict}

The judge of objects, colours and backgrounds was trained on drawings of both styles. The figures are of the file with
the SHA-256 {sha256}.
"""


def small(pictures: Pictures) -> npt.NDArray[np.float64]:
    """(N, S, S, 3) to what the linear classifier sees, (N, features)."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255
    shrunk = torch.nn.functional.interpolate(pixels, size=EDGE_PX, mode="area").flatten(1).numpy()
    return np.concatenate([shrunk, shrunk**2, np.ones((len(shrunk), 1))], axis=1)


class StyleClassifier:
    """Tells two styles apart by a linear function of small pictures, fitted to drawings of both (ridge regression)."""

    def __init__(self, plain: Pictures, styled: Pictures) -> None:
        features = np.concatenate([small(plain), small(styled)])
        wanted = np.repeat([-1.0, 1.0], [len(plain), len(styled)])
        square = features.T @ features + RIDGE * np.eye(features.shape[1])
        self._weights = np.linalg.solve(square, features.T @ wanted)

    def share(self, pictures: Pictures) -> float:
        """The share of pictures that look like the second style."""
        return round(float((small(pictures) @ self._weights > 0).mean()), 4)


def unseen_drawings() -> Drawings:
    """Drawings of each style and their labels, which neither the classifier of styles nor the judge is trained on."""
    return {name: classifier.draw(NUM_UNSEEN, "unseen", [style]) for name, style in STYLES.items()}


def trained_style(unseen: Drawings) -> tuple[StyleClassifier, dict[str, float]]:
    """The classifier of styles, and the share of unseen drawings of each that look like neon.

    Raises:
        SystemExit: it cannot tell drawings apart.
    """
    made = StyleClassifier(*(classifier.draw(NUM_DRAWINGS, "style", [style])[0] for style in STYLES.values()))
    found = {name: made.share(drawings) for name, (drawings, _) in unseen.items()}
    if found["plain"] > 1 - CHECK_BAR or found[NAME] < CHECK_BAR:
        sys.exit(f"drawings cannot be told apart, {found}: a verdict on pictures would mean nothing")
    return made, found


def trained_judge(folder: Path, unseen: Drawings) -> tuple[classifier.Classifier, dict[str, dict[str, float]]]:
    """The judge of both styles, and its shares on unseen drawings of each."""
    path = folder / f"classifier-{NAME}-{evaluate.digest()}.pt"
    judge = classifier.train(path, list(STYLES.values()), JUDGE_DRAWINGS)
    found = {
        name: evaluate.shares(truth.numpy(), classifier.predict(judge, classifier.shrink(drawings)))
        for name, (drawings, truth) in unseen.items()
    }
    return judge, found


def below_bars(result: Mapping[str, Any]) -> list[str]:
    """What is not good enough."""
    looks, objects = result["looks"], result["scores"]["with"]["object"]
    styled = BARS["styled"] * looks["decoded"]
    faults = [f"styled {looks['with']:.3f} < {styled:.3f}"] if not looks["with"] >= styled else []
    if not looks["without"] <= BARS["plain"]:
        faults.append(f"plain {looks['without']:.3f} > {BARS['plain']}")
    return faults if objects >= BARS["object"] else [*faults, f"object {objects:.3f} < {BARS['object']}"]


def measure(manifest: Path, adapter: Path, captions: int, out: Path) -> dict[str, Any]:
    """Draws with and without the adapter, and judges; writes style.json and style.png in `out`."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    unseen = unseen_drawings()
    style, drawn_looks = trained_style(unseen)
    judge, drawn_scores = trained_judge(out, unseen)
    print(f"drawings: {drawn_looks}; {drawn_scores}; {time.monotonic() - began:.0f} s", flush=True)
    specs, rng = evaluate.held_out_specs(captions, "style"), random.Random("style")
    prompts = [caption(spec, rng, full=True) for spec in specs]
    wanted = np.array([classifier.labels(spec) for spec in specs])
    pictures, looks, scores = {}, {}, {}
    for name, file in (("without", None), ("with", adapter)):
        drawn = Sampler(manifest, classifier.cores(), file).pictures(prompts, range(captions))
        pictures[name], looks[name] = drawn, style.share(drawn)
        scores[name] = evaluate.shares(wanted, classifier.predict(judge, classifier.shrink(drawn)))
        print(f"{name}: looks like {NAME} {looks[name]:.3f}; {scores[name]}; {time.monotonic() - began:.0f} s")
    drawn = np.stack([render(spec, style=NEON) for spec in specs])
    decoded = Sampler(manifest, classifier.cores()).decoded(drawn)
    looks["decoded"] = style.share(decoded)
    scores["decoded"] = evaluate.shares(wanted, classifier.predict(judge, classifier.shrink(decoded)))
    print(f"drawings through the decoder: looks like {NAME} {looks['decoded']:.3f}; {scores['decoded']}")
    result = {
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "captions": captions,
        "looks": looks,
        "scores": scores,
        "drawings": {"looks": drawn_looks, "scores": drawn_scores},
        "bars": BARS,
        "seconds": round(time.monotonic() - began),
    }
    result["faults"] = below_bars(result)
    (out / "style.json").write_text(json.dumps(result, indent=1) + "\n")
    pairs = [picture for pair in zip(pictures["without"], pictures["with"], strict=True) for picture in pair]
    evaluate.sheet(pairs[:64]).save(out / "style.png")
    return result


def card(result: Mapping[str, Any], trained: Mapping[str, Any], num_bytes: int, revision: str) -> str:
    """MODEL_CARD.md of an adapter from `measure`'s result and from its `FACTS`."""
    scores, drawn = result["scores"], result["drawings"]
    columns = scores["without"], scores["with"], scores["decoded"], drawn["scores"][NAME]
    lines = [
        f"| right {head} | " + " | ".join(f"{shares[head]:.3f}" for shares in columns) + " |"
        for head in classifier.HEADS
    ]
    return CARD.format(
        name=NAME,
        revision=revision,
        kib=num_bytes / 1024,
        **trained | {"layers": LAYERS[AdapterLayers(trained["layers"])]},
        captions=result["captions"],
        plain_looks=result["looks"]["without"],
        looks=result["looks"]["with"],
        decoded_looks=result["looks"]["decoded"],
        drawn_looks=drawn["looks"][NAME],
        scores="\n".join(lines),
        verdict=f"Below the bars: {'; '.join(result['faults'])}." if result["faults"] else "All bars are met.",
        sha256=result["adapter_sha256"],
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("out/lora/models"), help="with icons that takes adapters")
    parser.add_argument("--adapter", type=Path, default=Path("models/adapters") / NAME, help="its folder")
    parser.add_argument("--captions", type=int, default=NUM_CAPTIONS, help="held-out captions")
    parser.add_argument("--out", type=Path, default=Path("out/lora"), help="where results go")
    parser.add_argument("--card", action="store_true", help="write MODEL_CARD.md beside the adapter")
    options = parser.parse_args()
    if options.captions < 1:
        parser.error("--captions must be at least 1")
    torch.set_num_threads(classifier.cores())
    files = list(options.adapter.glob("*.safetensors"))
    if len(files) != 1:
        parser.error(f"--adapter {options.adapter} has {len(files)} files *.safetensors, not one")
    trained = read(options.adapter / FACTS) if options.card else {}
    manifest = evaluate.find_manifest(options.models, "icons", None)
    result = measure(manifest, files[0], options.captions, options.out)
    if options.card:
        (options.adapter / "MODEL_CARD.md").write_text(card(result, trained, files[0].stat().st_size, "1.0"))
    print("\n".join(result["faults"]) or "above all bars", f"({result['seconds']} s; {options.out}/style.json)")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
