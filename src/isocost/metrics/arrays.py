"""Feature matrices as NumPy arrays or torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]
Features = ArrayLike | Tensor
"""[N, D]. A tensor is processed on its device, anything else by NumPy. Results are floats or NumPy arrays."""


def as_matrix(features: Features) -> Any:
    """Features [N, D] in float64; a tensor stays a tensor on its device.

    Raises:
        ValueError: the features are not two-dimensional.
    """
    matrix = features.double() if isinstance(features, Tensor) else np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"features must be [N, D], not {tuple(matrix.shape)}")
    return matrix


def array_module(array: Any) -> Any:
    """The module whose functions fit `array`: torch or numpy."""
    return torch if isinstance(array, Tensor) else np


def unit_rows(matrix: Any) -> Any:
    """[N, D] with each row scaled to length 1."""
    return matrix / ((matrix * matrix).sum(1) ** 0.5)[:, None]


def to_numpy(array: Any) -> Array:
    """`array` as NumPy, copied from its device if it is a tensor."""
    return array.cpu().numpy() if isinstance(array, Tensor) else array
