"""Scores of single images, pairs of images and images with captions: one number an image.

Legend: N images or pairs, H x W pixels, D features, L logits.
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
    """Peak signal-to-noise ratio of images in pairs, [N, ...] twice, in dB: [N]; infinite for equal images."""
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"images in pairs must have one shape, not {left.shape} and {right.shape}")
    error = np.square(left - right).reshape(len(left), -1).mean(1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / error)


def ssim(a: Tensor, b: Tensor, *, peak: float = 255.0) -> Array:
    """Structural similarity of images in pairs, [N, C, H, W] twice, in 0..peak: [N], the mean over channels and places.

    Wang et al. 2004, section III-B: Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, places where the
    window fits whole. float64, on the device of `a`.

    Raises:
        ValueError: the shapes differ, or an image is smaller than the window.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images in pairs must have one shape [N, C, H, W], not {list(a.shape)} and {list(b.shape)}")
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels, not {list(a.shape[-2:])}")
    left, right = a.double(), b.to(a.device).double()
    mean_a, mean_b = _blur(left), _blur(right)
    var_a, var_b = _blur(left * left) - mean_a**2, _blur(right * right) - mean_b**2
    both = _blur(left * right) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3)).cpu().numpy()


def cosine(a: ArrayLike, b: ArrayLike) -> Array:
    """Cosine of features in pairs, [N, D] twice: [N].

    With CLIP's embeddings of images and their captions the CLIP score of arXiv 2404.01367, without factor or clipping.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (left * right).sum(1) / np.sqrt(np.square(left).sum(1) * np.square(right).sum(1))


def mean_cosine_to_set(features: ArrayLike, others: ArrayLike) -> Array:
    """Mean cosine of each of features [N, D] to all of [M, D]: [N]; CLIP-I and DINO of DreamBooth (arXiv 2208.12242, 4.2)."""
    unit = [
        one / np.linalg.norm(one, axis=1, keepdims=True)
        for one in (np.asarray(f, dtype=np.float64) for f in (features, others))
    ]
    return (unit[0] @ unit[1].T).mean(1)


def inception_score(logits: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """exp of the mean KL divergence of each image's classes from all images' (arXiv 1606.03498): [R].

    Logits [N, L]; `weights` [R, N] says how often each of R resamples draws each image, all once where absent. Biased
    downwards at few images: compare at equal N only.
    """
    matrix = np.asarray(logits, dtype=np.float64)
    log_p = matrix - matrix.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    counts = np.ones((1, len(matrix))) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = counts / counts.sum(1, keepdims=True)
    marginal = shares @ p
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(marginal > 0, marginal * np.log(marginal), 0.0).sum(1)
    return np.exp(shares @ (p * log_p).sum(1) - cross)


def _blur(images: Tensor) -> Tensor:
    """[N, C, H, W] by the Gaussian window, where it fits whole."""
    places = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-(places**2) / (2 * SSIM_DEVIATION**2))
    window = window / window.sum()
    channels = images.shape[1]
    rows = functional.conv2d(images, window.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return functional.conv2d(rows, window.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
