"""The quality gate of a quantized revision: bounds, and how pictures are held to them. Needs neither torch nor onnx."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safelight_server.catalog.manifest import Manifest, QualityGate
from safelight_server.export.source import ExportError
from safelight_server.quantization.judges import Judge, Pictures, same_labels
from safelight_server.runtime.base import CostCurve

MAX_PSNR_DB = 100.0


@dataclass(frozen=True)
class QualityOptions:
    """How good a quantized revision must be.

    Attributes:
        num_pictures: how many pictures are drawn with both denoisers.
        min_psnr_db: least median of PSNR to the float pictures, of each size and kind.
        min_agreement: least share of the judge's labels that are the same.
        judge: labels pictures; None: they are compared by PSNR alone.
    """

    num_pictures: int = 16
    min_psnr_db: float = 20.0
    min_agreement: float = 0.95
    judge: Judge | None = None


def psnr_db(one: Pictures, other: Pictures) -> list[float]:
    """Peak signal-to-noise ratio of pairs of pictures in dB, at most `MAX_PSNR_DB`, which equal ones have."""
    errors = np.mean((one.astype(np.float64) - other) ** 2, axis=(1, 2, 3))
    return [min(MAX_PSNR_DB, 10 * math.log10(255**2 / error)) if error else MAX_PSNR_DB for error in errors.tolist()]


@dataclass(frozen=True)
class DrawnTwice:
    """Pictures of one size and kind that both denoisers made of the same prompts and seeds."""

    prompts: Sequence[str]
    of_float: Pictures
    pictures: Pictures


def compared(drawn: Sequence[DrawnTwice], options: QualityOptions) -> QualityGate:
    """The figures of all pictures.

    Raises:
        ExportError: the judge gives no labels that can be compared.
    """
    found = [psnr_db(at.of_float, at.pictures) for at in drawn]
    agreement = None
    if (judge := options.judge) is not None:
        same = [same_labels(judge, at.prompts, at.of_float, at.pictures).ravel() for at in drawn]
        agreement = round(min(float(at.mean()) for at in same), 4)
    return QualityGate(
        num_pictures=sum(len(at) for at in found),
        psnr_db=round(min(statistics.median(at) for at in found), 2),
        least_psnr_db=round(min(min(at) for at in found), 2),
        agreement=agreement,
        min_psnr_db=options.min_psnr_db,
        min_agreement=options.min_agreement,
    )


def require_quantizable(name: str, manifest: Manifest) -> None:
    """Refuses what `quantize` does not offer.

    Args:
        name: of the pipeline, for the error.

    Raises:
        ExportError: it is quantized already.
    """
    if manifest.quantization is not None:
        raise ExportError(f"{name}: it is quantized already")


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
