"""The array types that stages pass to each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.float32] | npt.NDArray[np.int64]
Embedding = Mapping[str, FloatArray]
"""What an encoder makes of one prompt or one picture: arrays by the names of its outputs, without the row axis."""
