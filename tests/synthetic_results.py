"""Synthetic tables of points with a known law, so that the correct result of an analysis is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from isocost.analysis.costs import COSTS

PARAMETERS = {"0.2M": 2e5, "0.8M": 8e5, "3.2M": 3.2e6, "7.1M": 7.1e6, "12.6M": 1.26e7}
BEST_GUIDANCE = 2.0
TABLE_1 = {  # size: (millions of parameters, normalized cost, FID at 50 steps)
    "39M": (39, 0.07, 25.30),
    "83M": (83, 0.13, 24.30),
    "145M": (145, 0.20, 24.18),
    "223M": (223, 0.30, 23.76),
    "318M": (318, 0.40, 22.83),
    "430M": (430, 0.53, 22.35),
    "558M": (558, 0.67, 22.15),
    "704M": (704, 0.83, 21.82),
    "866M": (866, 1.00, 21.55),
    "2B": (2000, 2.39, 20.98),
    "5B": (5000, 5.17, 20.14),
}


def synthetic_table(
    sizes: Sequence[str] = tuple(PARAMETERS),
    num_steps: Sequence[int] = (2, 4, 8, 16, 32),
    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0),
    solvers: Sequence[str] = ("ddim/trailing", "dpmsolver++2m/trailing"),
    snapshots: Sequence[int] = (25_000, 50_000, 100_000),
    images_seen: int = 200_000,
    noise: float = 0.0,
    half_width: float = 0.004,
) -> pd.DataFrame:
    """Return points whose distance falls with size, steps and images seen; guidance 2 is best, DPM needs fewer steps."""
    generator = np.random.default_rng(0)
    rows = []
    for size in sizes:
        for seen in (*snapshots, images_seen):
            for solver in solvers:
                for steps in num_steps:
                    for weight in guidance:
                        is_final = seen == images_seen
                        if not is_final and (solver, steps, weight) != (solvers[0], num_steps[-2], BEST_GUIDANCE):
                            continue
                        error = noise * generator.standard_normal()
                        rows.append(_row(size, seen, solver, steps, weight, is_final, error, half_width))
    table = pd.DataFrame(rows)
    return table.assign(point=[f"{number:016x}" for number in range(len(table))])


def _row(
    size: str, seen: int, solver: str, steps: int, guidance: float, is_final: bool, error: float, half_width: float
) -> Mapping[str, object]:
    parameters = PARAMETERS[size]
    gflop = parameters * 6e-7
    passes = 1 if guidance == 1 else 2
    effective = steps * (1.6 if solver.startswith("dpm") else 1.0)
    distance = (
        0.02
        + 8.0 / parameters**0.4 * (200_000 / seen) ** 0.35
        + 0.5 / effective**1.3
        + 0.03 * np.log(guidance / BEST_GUIDANCE) ** 2
    )
    distance += error
    alignment = 0.9 - distance
    return {
        "point": "",
        "checkpoint": f"{size}-{seen}",
        "size": size,
        "width": int(8 * (parameters / 2e5) ** 0.5),
        "num_parameters": int(parameters),
        "images_seen": seen,
        "training_gflop": 3 * gflop * seen,
        "is_final": is_final,
        "solver": solver,
        "num_steps": steps,
        "guidance": guidance,
        "num_images": 1000,
        "seed": 0,
        "protocol": "synthetic",
        "normalized_cost": gflop * steps / 3,
        "nfe": float(steps * passes),
        "gflop": gflop * steps * passes,
        **dict.fromkeys(("gflop_text", "gflop_encoder", "gflop_decoder"), 0.0),
        "gflop_denoiser": gflop * steps * passes,
        "ms_per_image": 0.05 * steps * passes * (1 + gflop),
        "joules_per_image": 0.02 * steps * passes * (1 + gflop),
        "usd_per_1000": 0.00005 * steps * passes * (1 + gflop),
        "latency_ms": 1 + 0.2 * steps * (1 + 0.1 * passes * gflop),
        "mmd_efficientnet": distance,
        "mmd_efficientnet_low": distance - half_width,
        "mmd_efficientnet_high": distance + half_width,
        "frechet_efficientnet": 300 * distance,
        "frechet_efficientnet_low": 300 * (distance - half_width),
        "frechet_efficientnet_high": 300 * (distance + half_width),
        "alignment": alignment,
        "alignment_low": alignment - 0.01,
        "alignment_high": alignment + 0.01,
    }


def measured(table: pd.DataFrame, half_width: float, seed: int, metric: str = "mmd_efficientnet") -> pd.DataFrame:
    """Return the table with measurement noise: every score has an error, and an interval that covers it in 95 % of cases."""
    noise = half_width / 1.959964 * np.random.default_rng(seed).standard_normal(len(table))
    score = table[metric] + noise
    return table.assign(**{metric: score, f"{metric}_low": score - half_width, f"{metric}_high": score + half_width})


def exact(table: pd.DataFrame, metric: str = "mmd_efficientnet") -> pd.DataFrame:
    """Return the table without intervals."""
    return table.assign(**{f"{metric}_low": np.nan, f"{metric}_high": np.nan})


def paper_table() -> pd.DataFrame:
    """Return Table 1 as points: 50 steps of DDIM, guidance 7.5, the published FID as a distance without an interval."""
    first = synthetic_table(sizes=("0.2M",), num_steps=(4,), guidance=(1.0,), solvers=("ddim/leading",), snapshots=())
    rows = [
        first.assign(
            point=size, checkpoint=size, size=size, num_parameters=millions * 10**6, num_steps=50, guidance=7.5,
            normalized_cost=cost * 50, frechet_efficientnet=fid,
            frechet_efficientnet_low=np.nan, frechet_efficientnet_high=np.nan,
        )
        for size, (millions, cost, fid) in TABLE_1.items()
    ]  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def synthetic_students(speedup: int = 8, loss: float = 0.03, num_steps: Sequence[int] = (1, 2, 4)) -> pd.DataFrame:
    """Return the synthetic table of one solver and a "codi" student of every size, which needs no second pass for guidance.

    In n steps a student is as good as its teacher in `speedup` * n steps, plus `loss`, so it is better only at few steps.
    """
    teachers = synthetic_table(num_steps=(1, 2, 4, 8, 16, 32), solvers=("ddim/trailing",), snapshots=())
    rows = []
    for size in PARAMETERS:
        for steps in num_steps:
            reached = _row(size, 200_000, "lcm/trailing", speedup * steps, BEST_GUIDANCE, True, loss, 0.004)
            spent = _row(size, 200_000, "lcm/trailing", steps, 1.0, True, 0.0, 0.004)
            costs = {name: spent[name] for name in COSTS}
            rows.append({**reached, **costs, "size": f"{size} codi", "checkpoint": f"{size}-codi", "num_steps": steps})
    students = pd.DataFrame(rows)
    return pd.concat([teachers, students.assign(point=[f"5{number:015x}" for number in range(len(rows))])], ignore_index=True)


GUIDE_GAINS = {"0.8M@50000": 1.0, "0.8M": 0.5, "0.8M/null": 0.0, "3.2M@50000": -1.0}
"""Guide -> the fraction of the planted gain that it brings."""


def synthetic_guides(gain: float, half_width: float = 0.004, guides: Sequence[str] = tuple(GUIDE_GAINS)) -> pd.DataFrame:
    """Return two sizes without a guide, and every point again with each guide, at the same cost and better by the gain.

    "0.8M@50000" guides both sizes, the other guides 3.2M.

    So at equal cost the best point with a guide is better than the best point without one by `gain`. The frontier within an
    interval is that of all noise levels plus 0.001. The alignment follows the distance.
    """
    plain = synthetic_table(
        sizes=("0.8M", "3.2M"), num_steps=(2, 4, 8, 16), solvers=("ddim/trailing",), snapshots=(), half_width=half_width
    ).assign(guide=None, guide_checkpoint=None, guidance_interval=None, guidance_schedule=None, guide_nfe=0.0)

    def worse_by(rows: pd.DataFrame, amount: float) -> pd.DataFrame:
        distances = {f"mmd_efficientnet{end}": rows[f"mmd_efficientnet{end}"] + amount for end in ("", "_low", "_high")}
        alignment = {f"alignment{end}": rows[f"alignment{end}"] - amount for end in ("", "_low", "_high")}
        return rows.assign(**distances, **alignment)

    limited = plain[plain["guidance"] > 1].assign(guidance_interval="[-3.0, 2.0]")
    limited = worse_by(limited.assign(nfe=limited["nfe"] * 0.75, gflop=limited["gflop"] * 0.75), 0.001)
    parts = [plain, limited]
    for guide in guides:
        rows = plain[(plain["size"] == "3.2M") | (guide == "0.8M@50000")]
        rows = rows.assign(guidance=rows["guidance"] + 0.25, guide_nfe=rows["num_steps"].astype(float))
        by_guide = worse_by(rows, -gain * GUIDE_GAINS[guide]).assign(guide=guide, guide_checkpoint=f"checkpoint of {guide}")
        within = by_guide.assign(guidance_interval="[-3.0, 2.0]", guide_nfe=0.5 * by_guide["guide_nfe"])
        parts += [by_guide, worse_by(within.assign(nfe=1.5 * within["num_steps"]), 0.001)]
    table = pd.concat(parts, ignore_index=True).drop(columns=[f"frechet_efficientnet{end}" for end in ("", "_low", "_high")])
    return table.assign(point=[f"7{number:015x}" for number in range(len(table))])


def synthetic_superres(slope: float = 0.5) -> pd.DataFrame:
    """Return super-resolution scores of every size: 0.1 + `slope` times the best score of its checkpoint; from scratch 0.5.

    PSNR is 40 - 50 times the distance.
    """
    best = synthetic_table(snapshots=()).groupby("size")["mmd_efficientnet"].min()
    rows = []
    for size in PARAMETERS:
        for kind in ("", " from scratch"):
            distance = 0.5 if kind else 0.1 + slope * float(best[size])
            row = dict(_row(size, 50_000, "ddim/trailing", 8, 1.0, True, 0.0, 0.0))
            row |= {"size": size + kind, "checkpoint": size + kind, "point": f"6{len(rows):015x}", "task": "superres"}
            for name, value, half in (("mmd_efficientnet", distance, 0.01), ("psnr", 40 - 50 * distance, 0.5)):
                row |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
            rows.append(row)
    return pd.DataFrame(rows)
