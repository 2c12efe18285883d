"""The learning rate as a function of the images seen."""

from __future__ import annotations

import math

from isocost.config.training import TrainSpec


def learning_rate(spec: TrainSpec, images_seen: int) -> float:
    """Return the learning rate of the step after `images_seen` images: a linear warm-up times the schedule.

    constant: the paper's "lr 1e-4 for every size". cosine: decays to 0 at `num_images` (Loshchilov & Hutter, arXiv
    1608.03983). wsd: warm-up, stable, then a linear decay to 0 over the last `lr_decay_fraction` of the images (Hu et al.,
    arXiv 2404.06395).
    """
    warmup = min(1.0, (images_seen + spec.batch_size) / spec.warmup_images) if spec.warmup_images else 1.0
    if spec.lr_schedule == "cosine":
        start = min(spec.warmup_images, spec.num_images - 1)
        progress = min(1.0, max(0.0, (images_seen - start) / (spec.num_images - start)))
        return spec.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
    if spec.lr_schedule == "wsd":
        decay = max(0.0, spec.num_images - images_seen) / (spec.lr_decay_fraction * spec.num_images)
        return spec.lr * warmup * min(1.0, decay)
    return spec.lr * warmup
