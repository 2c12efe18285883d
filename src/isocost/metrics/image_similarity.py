"""Scores with one value per image, from pairs of images, pairs of features, or class logits.

Shapes: N images or pairs, M other images, H x W pixels, D features, L logits, R resamples.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(a: ArrayLike, b: ArrayLike, *, peak: float = 255.0) -> Array:
    """Peak signal-to-noise ratio in dB of N pairs of images.

    Args:
        a: [N, ...].
        b: the counterparts, of the same shape.
        peak: largest possible value of a pixel.

    Returns:
        float64 [N]; infinite for equal images.

    Raises:
        ValueError: the shapes differ.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"paired images must have one shape, not {left.shape} and {right.shape}")
    error = np.square(left - right).reshape(len(left), -1).mean(1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / error)


def ssim(a: Tensor, b: Tensor, *, peak: float = 255.0) -> Array:
    """Structural similarity of N pairs of images, the mean over channels and positions.

    Wang et al. 2004, section III-B: Gaussian window of 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03, at the positions
    where the whole window fits. Computed in float64 on the device of `a`.

    Args:
        a: [N, C, H, W], values 0..peak.
        b: the counterparts, of the same shape.
        peak: largest possible value of a pixel.

    Returns:
        float64 [N].

    Raises:
        ValueError: the shapes differ, or an image is smaller than the window.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"paired images must have one shape [N, C, H, W], not {list(a.shape)} and {list(b.shape)}")
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels, not {list(a.shape[-2:])}")
    left, right = a.double(), b.to(a.device).double()
    mean_a, mean_b = _blur(left), _blur(right)
    var_a, var_b = _blur(left * left) - mean_a**2, _blur(right * right) - mean_b**2
    covariance = _blur(left * right) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3)).cpu().numpy()


def cosine(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosine similarity of N pairs of features, both [N, D]: [N].

    On CLIP embeddings of images and their prompts this is the CLIP score of arXiv 2404.01367, without factor or clipping.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (left * right).sum(1) / np.sqrt(np.square(left).sum(1) * np.square(right).sum(1))


def mean_cosine_to_set(features: ArrayLike, others: ArrayLike) -> Array:
    """Mean cosine similarity of each row of features [N, D] to all rows of `others` [M, D]: [N].

    On CLIP and DINO features these are DreamBooth's CLIP-I and DINO scores (arXiv 2208.12242, section 4.2).
    """
    unit_features, unit_others = (
        matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        for matrix in (np.asarray(rows, dtype=np.float64) for rows in (features, others))
    )
    return (unit_features @ unit_others.T).mean(1)


def inception_score(logits: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Inception score: exp of the mean KL divergence of an image's classes from the average classes (arXiv 1606.03498).

    The score is biased downwards for few images: compare values at equal N only.

    Args:
        logits: [N, L].
        weights: [R, N], how often each resample contains each image; by default one resample that contains each image once.

    Returns:
        float64 [R].
    """
    matrix = np.asarray(logits, dtype=np.float64)
    log_p = matrix - matrix.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    counts = np.ones((1, len(matrix))) if weights is None else np.asarray(weights, dtype=np.float64)
    fractions = counts / counts.sum(1, keepdims=True)
    marginal = fractions @ p
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(marginal > 0, marginal * np.log(marginal), 0.0).sum(1)
    return np.exp(fractions @ (p * log_p).sum(1) - cross)


def _blur(images: Tensor) -> Tensor:
    """Blur [N, C, H, W] with the Gaussian window at the positions where the whole window fits."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_DEVIATION**2))
    window = window / window.sum()
    channels = images.shape[1]
    rows = functional.conv2d(images, window.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return functional.conv2d(rows, window.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
