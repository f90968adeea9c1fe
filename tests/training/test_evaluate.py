"""The evaluation's arithmetic: what is asked for, what counts as right, what is a copy, and when it fails."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import classifier, copies, evaluate
from training.data import training_spec
from training.icons import held_out
from training.icons.render import render
from training.recipe import RECIPE

GOOD = {"object": 0.95, "colour": 0.95, "background": 0.97, "sparkles": 0.0, "tilt": 0.0}


def test_only_held_out_triples_are_asked_for_and_the_same_every_time() -> None:
    specs = evaluate.held_out_specs(200, "evaluation")
    assert len(specs) == 200
    assert all(held_out(spec.object, spec.colour, spec.background) for spec in specs)
    assert specs == evaluate.held_out_specs(200, "evaluation")
    assert specs != evaluate.held_out_specs(200, "reference")


def test_shares_count_each_head_alone() -> None:
    wanted = np.zeros((4, 5), np.int64)
    found = wanted.copy()
    found[0, 0] = found[1, 0] = found[2, 3] = 1
    assert evaluate.shares(wanted, found) == {
        "object": 0.5,
        "colour": 1.0,
        "background": 1.0,
        "sparkles": 0.75,
        "tilt": 1.0,
    }


@pytest.mark.parametrize("name", ["object", "colour", "background"])
@pytest.mark.parametrize("less", [0.002, float("nan")])
def test_each_bar_can_fail(name: str, less: float) -> None:
    assert evaluate.below_bars(GOOD, evaluate.COPIES_BAR) == []
    (fault,) = evaluate.below_bars(GOOD | {name: GOOD[name] - less}, 0.0)
    assert fault.startswith(name)


def test_too_many_copies_fail() -> None:
    assert evaluate.below_bars(GOOD, 0.022) == ["copies 0.022 > 0.02"]


@pytest.mark.parametrize(("faults", "code"), [([], 0), (["object 0.9 < 0.95"], 1)])
def test_the_exit_code_says_whether_the_bars_are_met(
    faults: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "pipelines" / "icons" / "r1" / "pipeline.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    asked = []

    def measure(*args: object) -> dict[str, object]:
        asked.append(args)
        shown = {"scores": GOOD, "judge_on_real_drawings": GOOD, "copies": {"share_below": 0.0}, "faults": faults}
        return shown | {"pipeline": "icons/r1", "captions": 3, "seconds": 1}

    monkeypatch.setattr(evaluate, "measure", measure)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["evaluate", "--models", str(tmp_path), "--captions", "3", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == code
    assert asked == [(manifest, 3, out)]
    assert (faults[0] if faults else "above all bars") in capsys.readouterr().out


def test_the_newest_revision_is_scored_and_an_unknown_one_refused(tmp_path: Path) -> None:
    for revision in ("r1", "r10", "r9"):
        place = tmp_path / "pipelines" / "icons" / revision
        place.mkdir(parents=True)
        (place / "pipeline.json").write_text("{}")
    assert evaluate.find_manifest(tmp_path, "icons", None).parent.name == "r10"
    assert evaluate.find_manifest(tmp_path, "icons", "r1").parent.name == "r1"
    with pytest.raises(SystemExit, match="no icons of revision r3"):
        evaluate.find_manifest(tmp_path, "icons", "r3")


def test_a_judge_that_misjudges_real_drawings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "NUM_REAL", 40)
    monkeypatch.setattr(classifier, "train", lambda path: classifier.Classifier().eval())
    with pytest.raises(SystemExit, match="its verdict would mean nothing"):
        evaluate.trained_judge(tmp_path)


def test_a_picture_is_listed_where_it_is_wrong() -> None:
    wanted = np.zeros((2, 5), np.int64)
    found = wanted.copy()
    found[1, 1] = 1
    lists = evaluate.wrong(["a red gem", "a red key"], wanted, found)
    assert lists["colour"] == ["a red key: orange"]
    assert lists["object"] == []


def test_the_most_frequent_mistakes_come_first() -> None:
    wanted = np.zeros((4, 5), np.int64)
    found = wanted.copy()
    found[0, 0] = found[1, 1] = found[2, 1] = found[3, 3] = 1
    assert evaluate.confused(wanted, found) == ["red as orange 2", "potion as sword 1"]


def test_the_nearest_distance_is_the_smallest() -> None:
    rng = np.random.default_rng(0)
    known, queries = rng.random((300, 12), np.float32), rng.random((150, 12), np.float32)
    expected = np.linalg.norm(queries[:, None] - known[None], axis=2).min(axis=1)
    np.testing.assert_allclose(copies.nearest(queries, known), expected, atol=1e-3)


def test_a_copied_training_drawing_is_seen_and_an_unseen_drawing_is_not() -> None:
    unseen = evaluate.held_out_specs(120, "reference")
    copied = [render(training_spec(RECIPE, index)) for index in range(0, 100, 10)]
    fresh = [render(spec) for spec in evaluate.held_out_specs(40, "fresh")]
    assert copies.nearness(copied, unseen, count=100).share_below == 1.0
    assert copies.nearness(fresh, unseen, count=100).share_below <= 0.1


def test_by_definition_one_in_a_hundred_unseen_drawings_is_below_the_limit() -> None:
    honest = np.linspace(1, 2, 1001, dtype=np.float32)
    assert copies.compare(honest, honest).share_below == pytest.approx(0.01, abs=0.001)


def test_the_sheet_keeps_the_last_row() -> None:
    pictures = [np.full((2, 2, 3), value, np.uint8) for value in range(1, 6)]
    image: Image.Image = evaluate.sheet(pictures, columns=2)
    assert np.asarray(image)[::2, ::2, 0].tolist() == [[1, 2], [3, 4], [5, 0]]
