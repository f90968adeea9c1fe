"""Judges of quantized pictures: functions of the user's, and every way in which one can be of no use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safelight_server.export.source import ExportError
from safelight_server.quantization import judges
from safelight_server.quantization.judges import Pictures

PICTURES = np.zeros((4, 2, 2, 3), np.uint8)
PROMPTS = ["a", "b", "c", "d"]


def brightness(prompts: Sequence[str], pictures: Pictures) -> np.ndarray:
    """A judge."""
    return pictures.reshape(len(prompts), -1).mean(axis=1, keepdims=True)


NO_FUNCTION = 3


def test_a_judge_is_found_by_its_name() -> None:
    assert judges.judge_of(f"{__name__}:brightness") is brightness


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("judge", "--judge judge: must be MODULE:FUNCTION, such as training.judge:labels"),
        (":judge", "must be MODULE:FUNCTION"),
        (
            "nowhere.at.all:judge",
            "--judge nowhere.at.all:judge: cannot be imported: ModuleNotFoundError: No module named",
        ),
        (f"{__name__}:nobody", "test_judges has no function nobody"),
        (f"{__name__}:NO_FUNCTION", "has no function NO_FUNCTION"),
    ],
)
def test_a_name_that_is_no_judge_is_refused(name: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        judges.judge_of(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def", "SyntaxError: "),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('no pictures here')", "SystemExit: no pictures here"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "broken_judge.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(ExportError) as refused:
        judges.judge_of("broken_judge:judge")
    assert str(refused.value).startswith(f"--judge broken_judge:judge: cannot be imported: {said}")
    assert "\n" not in str(refused.value)
    assert sys.path == before


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(4), r"returned the shape \(4,\); labels of 4 pictures must be \(4, K\) numbers or texts"),
        (np.zeros((3, 2)), r"returned the shape \(3, 2\)"),
        (np.zeros((4, 0)), r"returned the shape \(4, 0\)"),
        (None, r"returned the shape \(\)"),
        ([["a"], ["b"], ["c"], ["d", "e"]], "failed: ValueError"),
        (np.full((4, 1), np.nan), "returned NaN, which equals nothing"),
        (np.full((4, 1), None), "returned object"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(labels: Any, said: str) -> None:
    def of_no_use(prompts: Sequence[str], pictures: Pictures) -> Any:
        return labels

    with pytest.raises(ExportError, match=f"^--judge {__name__}:.*of_no_use: {said}"):
        judges.labels(of_no_use, PROMPTS, PICTURES)


@pytest.mark.parametrize("error", [RuntimeError("no\nGPU"), SystemExit("no GPU"), KeyError("no GPU")])
def test_a_judge_that_fails_is_named(error: BaseException) -> None:
    def fails(prompts: Sequence[str], pictures: Pictures) -> np.ndarray:
        raise error

    with pytest.raises(ExportError, match=f"fails: failed: {type(error).__name__}: .*no GPU"):
        judges.labels(fails, PROMPTS, PICTURES)


def test_a_judge_cannot_change_pictures_and_says_as_much_each_time() -> None:
    numbers = iter((1, 2))

    def changes(prompts: Sequence[str], pictures: Pictures) -> np.ndarray:
        pictures += 1
        return np.ones((len(pictures), next(numbers)))

    with pytest.raises(ExportError, match=r"returned \(4, 1\) and then \(4, 2\) labels of as many pictures"):
        judges.same_labels(changes, PROMPTS, PICTURES, PICTURES)
    assert not PICTURES.any()


def test_labels_of_numbers_and_texts_are_compared_one_by_one() -> None:
    other = PICTURES.copy()
    other[1] = 9
    assert judges.same_labels(brightness, PROMPTS, PICTURES, other).tolist() == [[True], [False], [True], [True]]


def test_a_judge_is_looked_for_before_anything_is_read() -> None:
    command = [sys.executable, "-m", "safelight_server", "export", "no-such-folder", "--quantize", "int8"]
    ended = subprocess.run(
        [*command, "--judge", "nowhere:judge"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "server"},
    )
    assert ended.returncode == 2
    assert "--judge nowhere:judge: cannot be imported: ModuleNotFoundError" in ended.stderr
