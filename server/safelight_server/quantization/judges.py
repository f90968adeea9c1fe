"""Judges: functions of the user's that label pictures, to compare the labels of float pictures and quantized ones.

A judge is foreign code: whatever it does wrong is an ExportError that names it. Needs neither torch nor onnx.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from safelight_server.export.source import ExportError

Pictures = npt.NDArray[np.uint8]
"""(N, H, W, 3)."""
Judge = Callable[[Sequence[str], Pictures], npt.NDArray[Any]]
"""Labels of pictures that were drawn for prompts: (N, K), numbers or texts."""


def judge_of(name: str) -> Judge:
    """The judge of MODULE:FUNCTION; modules of the folder in which the command runs are found too.

    Raises:
        ExportError: there is none of that name, or its module cannot be imported.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ExportError(f"--judge {name}: must be MODULE:FUNCTION, such as training.judge:labels")
    with _named(f"--judge {name}: cannot be imported"), _folder_is_searched():
        found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ExportError(f"--judge {name}: {module} has no function {function}")
    judge: Judge = found
    return judge


def same_labels(judge: Judge, prompts: Sequence[str], one: Pictures, other: Pictures) -> npt.NDArray[np.bool_]:
    """Which labels of two drawings of the same prompts are equal, (N, K).

    Raises:
        ExportError: the judge fails, or returns what cannot be compared.
    """
    of_one, of_other = (labels(judge, prompts, pictures) for pictures in (one, other))
    if of_one.shape != of_other.shape:
        shapes = f"{of_one.shape} and then {of_other.shape}"
        raise ExportError(f"{_name(judge)}: returned {shapes} labels of as many pictures")
    return np.asarray(of_one == of_other)


def labels(judge: Judge, prompts: Sequence[str], pictures: Pictures) -> npt.NDArray[Any]:
    """What a judge says of pictures, (N, K).

    Raises:
        ExportError: it fails, or returns something else.
    """
    name = _name(judge)
    with _named(f"{name}: failed"), _folder_is_searched():
        found = np.asarray(judge(prompts, pictures.copy()))  # a copy: the next one is given the same pictures
    expected = f"labels of {len(pictures)} pictures must be ({len(pictures)}, K) numbers or texts"
    if found.ndim != 2 or len(found) != len(pictures) or not found.size:
        raise ExportError(f"{name}: returned the shape {found.shape}; {expected}")
    if found.dtype.kind not in "biufUS":
        raise ExportError(f"{name}: returned {found.dtype}; {expected}")
    if found.dtype.kind == "f" and np.isnan(found).any():
        raise ExportError(f"{name}: returned NaN, which equals nothing; {expected}")
    return found


def _name(judge: Judge) -> str:
    return f"--judge {judge.__module__}:{getattr(judge, '__qualname__', type(judge).__name__)}"


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turns every error of a block into an ExportError of one line; also sys.exit, by which scripts refuse."""
    try:
        yield
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split())
        raise ExportError(f"{what}: {type(error).__name__}: {why}") from error


@contextlib.contextmanager
def _folder_is_searched() -> Iterator[None]:
    """A block in which modules of the folder of the process are found, as `python -m` finds them."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
