"""The quality gate of a quantized revision: bounds, and how pictures are held to them. Needs neither torch nor onnx."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safelight_server.catalog.manifest import (
    ENCODER_SOURCE,
    LATENT_SOURCE,
    SIZE_IDS_SOURCE,
    TIMESTEP_SOURCE,
    Manifest,
    QualityGate,
)
from safelight_server.export.source import ExportError
from safelight_server.runtime.base import CostCurve

CALIBRATED = (LATENT_SOURCE, TIMESTEP_SOURCE, SIZE_IDS_SOURCE)
"""Sources of a denoiser's inputs, apart from a text encoder's outputs, that calibration fills (`offline.py`)."""
MAX_PSNR_DB = 100.0

Pictures = npt.NDArray[np.uint8]
"""(N, H, W, 3)."""
Judge = Callable[[Sequence[str], Pictures], npt.NDArray[Any]]
"""Labels of pictures that were drawn for prompts: (N, K), of any type that compares."""


@dataclass(frozen=True)
class QualityOptions:
    """How good a quantized revision must be.

    Attributes:
        num_pictures: how many pictures are drawn with both denoisers.
        min_psnr_db: least median of PSNR to the float pictures.
        min_agreement: least share of the judge's labels that are the same.
        judge: labels pictures; None: they are compared by PSNR alone.
    """

    num_pictures: int = 16
    min_psnr_db: float = 20.0
    min_agreement: float = 0.95
    judge: Judge | None = None


def judge_of(name: str) -> Judge:
    """The judge of MODULE:FUNCTION; modules of the folder in which the command runs are found too.

    Raises:
        ExportError: there is none of that name.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found: Judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ExportError(f"--judge {name}: {error}") from None
    finally:
        sys.path.remove("")
    return found


def psnr_db(one: Pictures, other: Pictures) -> list[float]:
    """Peak signal-to-noise ratio of pairs of pictures in dB, at most `MAX_PSNR_DB`, which equal ones have."""
    errors = np.mean((one.astype(np.float64) - other) ** 2, axis=(1, 2, 3))
    return [min(MAX_PSNR_DB, 10 * math.log10(255**2 / error)) if error else MAX_PSNR_DB for error in errors.tolist()]


def compared(
    prompts: Sequence[str], float_pictures: Pictures, pictures: Pictures, options: QualityOptions
) -> QualityGate:
    """The figures of the pictures that both denoisers made of the same prompts and seeds."""
    found = psnr_db(float_pictures, pictures)
    agreement = None
    if options.judge is not None:
        seen = [np.asarray(options.judge(prompts, one)) for one in (float_pictures, pictures)]
        agreement = round(float((seen[0] == seen[1]).mean()), 4)
    return QualityGate(
        num_pictures=len(pictures),
        psnr_db=round(statistics.median(found), 2),
        least_psnr_db=round(min(found), 2),
        agreement=agreement,
        min_psnr_db=options.min_psnr_db,
        min_agreement=options.min_agreement,
    )


def require_quantizable(name: str, manifest: Manifest) -> None:
    """Refuses what `quantize` does not offer.

    Args:
        name: of the pipeline, for the error.

    Raises:
        ExportError: it is quantized already, or its denoiser has an input that calibration does not fill.
    """
    if manifest.quantization is not None:
        raise ExportError(f"{name}: it is quantized already")
    sources = manifest.inputs.values()
    if others := [source for source in sources if source not in CALIBRATED and not source.startswith(ENCODER_SOURCE)]:
        raise ExportError(f"{name}: cannot quantize a denoiser that takes {', '.join(others)}")


def require(quality: QualityGate) -> None:
    """Refuses what is below its bounds.

    Raises:
        ExportError: it is; with every figure that is too low.
    """
    faults = []
    if not quality.psnr_db >= quality.min_psnr_db:
        faults.append(f"the median PSNR to float is {quality.psnr_db} dB, below --min-psnr {quality.min_psnr_db:g}")
    if quality.agreement is not None and not quality.agreement >= quality.min_agreement:
        faults.append(
            f"the judge sees the same in {quality.agreement:.1%}, below --min-agreement {quality.min_agreement:g}"
        )
    if faults:
        raise ExportError(f"the quantized revision is refused: {'; '.join(faults)}")


def require_batches(name: str, curve: CostCurve | None, bound: int) -> CostCurve:
    """The cost curve, if batches of `bound` rows were verified to be bit-equal to their rows alone.

    Raises:
        ExportError: they were not: the server would offer smaller batches, or none.
    """
    if curve is None or curve.rows[-1] < bound:
        verified = 0 if curve is None else curve.rows[-1]
        raise ExportError(
            f"{name}: batches of more than {verified} rows do not have the bits of their rows alone; {bound} are needed"
        )
    return curve
