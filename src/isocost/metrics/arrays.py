"""Feature matrices as NumPy arrays or torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]
Features = ArrayLike | Tensor
"""[N, D]; a tensor is worked on where it lies, anything else by NumPy. What comes back is a float or NumPy."""


# --- arrays -----------------------------------------------------------------------------------------------------------


def _matrix(features: Features) -> Any:
    """Features [N, D] in float64: a tensor stays a tensor on its device."""
    matrix = features.double() if isinstance(features, Tensor) else np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"features must be [N, D], not {tuple(matrix.shape)}")
    return matrix


def _space(array: Any) -> Any:
    return torch if isinstance(array, Tensor) else np


def _unit(matrix: Any) -> Any:
    return matrix / ((matrix * matrix).sum(1) ** 0.5)[:, None]


def _to_numpy(array: Any) -> Array:
    return array.cpu().numpy() if isinstance(array, Tensor) else array
