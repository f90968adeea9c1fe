"""`python -m training.judge`: measures whether the pictures of `make bench ONLY=replay` show what was requested.

It runs in the training environment: the judge is the classifier of
`training/evaluate.py`, trained on first use, which takes minutes, and kept in
the folder. Figures are by kind of answer, beside those of the same requests with
caches off. A picture served as SIMILAR has wrong words if it was developed for an
icon with another object, colour or background; it looks wrong if the judge sees one.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from load_tests.calibration.trace import DEFAULT, SEEDS, Asked, trace
from training import classifier
from training.evaluate import trained_judge

OUT = Path("out/replay")
JUDGE = Path("out/evaluate")
NAMED = ("object", "colour", "background")
Row = dict[str, Any]
Right = dict[int, dict[str, bool]]


def judged(
    pictures: Mapping[str, npt.NDArray[np.uint8]], asked: Sequence[Asked], judge: classifier.Classifier
) -> Right:
    """Judges each picture: which of its attributes are right, by the index of its request."""
    numbers = [int(number) for number in pictures]
    images = torch.cat([classifier.shrink(pictures[str(number)][None]) for number in numbers])
    found = classifier.predict(judge, images)
    wanted = np.array([classifier.labels(asked[number].icon) for number in numbers])
    heads = [list(classifier.HEADS).index(name) for name in NAMED]
    return {
        number: dict(zip(NAMED, (found[row, heads] == wanted[row, heads]).tolist(), strict=True))
        for row, number in enumerate(numbers)
    }


@functools.cache
def _trained() -> classifier.Classifier:
    return trained_judge(JUDGE)[0]


def labels(prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Object, colour and background that the judge sees in pictures (N, H, W, 3), as (N, 3); for `safelight export`."""
    found = classifier.predict(_trained(), classifier.shrink(pictures))
    return found[:, [list(classifier.HEADS).index(name) for name in NAMED]]


def accuracy(right: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Shares of right answers, and the number of judged pictures."""
    shares = {name: float(np.mean([one[name] for one in right])) for name in NAMED} if right else {}
    return shares | {"count": len(right)}


def wrong_words(served: Sequence[Row], asked: Sequence[Asked]) -> int:
    """Number of pictures served as SIMILAR that were developed for another object, colour or background."""
    pairs = [(asked[one["number"]].icon, asked[one["source"]].icon) for one in served if one["kind"] == "similar"]
    return sum(any(getattr(wanted, name) != getattr(source, name) for name in NAMED) for wanted, source in pairs)


def report(folder: Path, seed: int, judge: classifier.Classifier) -> dict[str, Any]:
    """Computes all figures of a trace."""
    asked = trace(seed, DEFAULT)
    answers = json.loads((folder / f"similar-{seed}.json").read_text())
    steps, served = answers["num_steps"], answers["served"]
    with np.load(folder / f"similar-{seed}.npz") as pictures, np.load(folder / f"off-{seed}.npz") as without:
        right, right_off = judged(pictures, asked, judge), judged(without, asked, judge)
    by_kind: dict[str, list[dict[str, bool]]] = defaultdict(list)
    for one in served:
        kind = one["kind"]
        if kind == "similar":
            source = served[one["source"]]["kind"]
            kind = f"similar, of a {source}"
        by_kind[f"latent, {one['num_steps_skipped'] / steps:.0%}" if kind == "latent" else kind].append(
            right[one["number"]]
        )
    similar = [one for one in served if one["kind"] == "similar"]
    common = sorted(right_off)
    return {
        "seed": seed,
        "num_steps": steps,
        "caches off": accuracy([right_off[number] for number in common]),
        "all allowed, the same requests": accuracy([right[number] for number in common]),
        "all allowed, all requests": accuracy(list(right.values())),
        "by kind": {kind: accuracy(rows) for kind, rows in sorted(by_kind.items())},
        "similar": len(similar),
        "similar, another icon by its words": wrong_words(served, asked),
    }


def main() -> None:
    """Judges the served pictures; prints the accuracies as JSON and writes them to judged.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(classifier.cores())
    judge, on_real = trained_judge(options.out)
    result = {"on real drawings": on_real, "seeds": [report(options.out, seed, judge) for seed in options.seeds]}
    (options.out / "judged.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
