"""A table of points with planted features: the law below is known, so what an analysis should find is known too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

PARAMETERS = {"0.2M": 2e5, "0.8M": 8e5, "3.2M": 3.2e6, "7.1M": 7.1e6, "12.6M": 1.26e7}
BEST_GUIDANCE = 2.0


def planted_table(
    sizes: Sequence[str] = tuple(PARAMETERS),
    num_steps: Sequence[int] = (2, 4, 8, 16, 32),
    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0),
    samplers: Sequence[str] = ("ddim/trailing", "dpmsolver++2m/trailing"),
    marks: Sequence[int] = (25_000, 50_000, 100_000),
    images_seen: int = 200_000,
    noise: float = 0.0,
    half_width: float = 0.004,
) -> pd.DataFrame:
    """Distance falls with size, steps and images seen; guidance 2 is best everywhere; second order needs fewer steps."""
    generator = np.random.default_rng(0)
    rows = []
    for size in sizes:
        for seen in (*marks, images_seen):
            for sampler in samplers:
                for steps in num_steps:
                    for weight in guidance:
                        is_final = seen == images_seen
                        if not is_final and (sampler, steps, weight) != (samplers[0], num_steps[-2], BEST_GUIDANCE):
                            continue
                        shown = noise * generator.standard_normal()
                        rows.append(_row(size, seen, sampler, steps, weight, is_final, shown, half_width))
    table = pd.DataFrame(rows)
    return table.assign(point=[f"{number:016x}" for number in range(len(table))])


def _row(
    size: str, seen: int, sampler: str, steps: int, guidance: float, is_final: bool, shown: float, half_width: float
) -> Mapping[str, object]:
    parameters = PARAMETERS[size]
    gflop = parameters * 6e-7
    passes = 1 if guidance == 1 else 2
    effective = steps * (1.6 if sampler.startswith("dpm") else 1.0)
    distance = (
        0.02
        + 8.0 / parameters**0.4 * (200_000 / seen) ** 0.35
        + 0.5 / effective**1.3
        + 0.03 * np.log(guidance / BEST_GUIDANCE) ** 2
    )
    distance += shown
    share = 0.9 - distance
    return {
        "point": "",
        "checkpoint": f"{size}-{seen}",
        "size": size,
        "width": int(8 * (parameters / 2e5) ** 0.5),
        "num_parameters": int(parameters),
        "images_seen": seen,
        "training_gflop": 3 * gflop * seen,
        "is_final": is_final,
        "sampler": sampler,
        "num_steps": steps,
        "guidance": guidance,
        "num_pictures": 1000,
        "seed": 0,
        "protocol": "planted",
        "paper_cost": gflop * steps / 3,
        "nfe": float(steps * passes),
        "gflop": gflop * steps * passes,
        "ms_per_picture": 0.05 * steps * passes * (1 + gflop),
        "kernel_efficientnet": distance,
        "kernel_efficientnet_low": distance - half_width,
        "kernel_efficientnet_high": distance + half_width,
        "frechet_efficientnet": 300 * distance,
        "frechet_efficientnet_low": 300 * (distance - half_width),
        "frechet_efficientnet_high": 300 * (distance + half_width),
        "alignment": share,
        "alignment_low": share - 0.01,
        "alignment_high": share + 0.01,
    }
