"""The row engine against a loop of diffusers' own scheduler, one setting a batch: the same network, grid and pictures.

    python benchmarks/engine.py [--quick] [--json]

Random weights: this measures time, never quality. Both are run in turns within one process; the value is the ratio of the
times of each turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from isocost.diffusion.engine import Engine, Row
from isocost.diffusion.noise import START_NOISE, Schedule, normal_noise
from isocost.diffusion.samplers import build_table
from isocost.models.checkpoint import scheduler_for
from isocost.models.unet import build_unet
from isocost.provenance import provenance
from isocost.study import ModelSpec, SamplerSpec

SHAPE, NUM_TOKENS, CONTEXT_WIDTH = (4, 8, 8), 16, 384
NUM_STEPS, GUIDANCE = (2, 4, 8), (1.0, 2.0, 5.0)


def diffusers_loop(
    network: UNet2DConditionModel, scheduler: DDIMScheduler, states: torch.Tensor, null: torch.Tensor, num: int, batch: int
) -> torch.Tensor:
    """Each setting by itself, as a script around a pipeline does it; [settings, num, C, H, W]."""
    made = []
    for num_steps in NUM_STEPS:
        for guidance in GUIDANCE:
            for start in range(0, num, batch):
                ids = torch.arange(start, min(start + batch, num))
                x = normal_noise(0, ids, START_NOISE, SHAPE, "cpu")
                scheduler.set_timesteps(num_steps)
                for t in scheduler.timesteps:
                    if guidance == 1:
                        output = network(x, t, states[ids]).sample
                    else:
                        both = torch.cat([null.expand(len(ids), -1, -1), states[ids]])
                        without, given = network(torch.cat([x, x]), t, both).sample.chunk(2)
                        output = without + guidance * (given - without)
                    x = scheduler.step(output, t, x).prev_sample
                made.append(x)
    return torch.cat(made)


def engine_stream(
    network: UNet2DConditionModel, states: torch.Tensor, null: torch.Tensor, num: int, batch: int
) -> torch.Tensor:
    """All settings in one stream of rows; [settings, num, C, H, W]."""
    schedule = Schedule.scaled_linear()
    tables = [build_table(SamplerSpec(), steps, schedule) for steps in NUM_STEPS]
    settings = [(table, guidance) for table in tables for guidance in GUIDANCE]
    rows = [Row(i, i, table, w, tag=at * num + i) for at, (table, w) in enumerate(settings) for i in range(num)]
    engine = Engine(
        lambda x, t, s: network(x, t, s).sample, "epsilon", lambda captions: states[captions], null, SHAPE, batch_size=batch
    )
    made = torch.empty(len(rows), *SHAPE)
    for finished in engine.run(rows):
        made[finished.row.tag] = finished.latent
    return made


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="fewer pictures and turns, under a minute")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    asked = options.parse_args()
    num, batch, turns = (24, 16, 3) if asked.quick else (96, 64, 7)
    torch.manual_seed(0)
    network = build_unet(ModelSpec(width=16, latent_channels=4, latent_side=8, context_width=CONTEXT_WIDTH)).eval()
    states, null = torch.randn(num, NUM_TOKENS, CONTEXT_WIDTH), torch.zeros(NUM_TOKENS, CONTEXT_WIDTH)
    scheduler = scheduler_for("epsilon")
    ratios, difference = [], 0.0
    with torch.inference_mode():
        for turn in range(turns + 1):
            started = time.perf_counter()
            theirs = diffusers_loop(network, scheduler, states, null, num, batch)
            between = time.perf_counter()
            ours = engine_stream(network, states, null, num, batch)
            ended = time.perf_counter()
            difference = max(difference, float((ours - theirs).abs().max()))
            if turn:
                ratios.append((between - started) / (ended - between))
                if not asked.json:
                    print(f"turn {turn}: loop {between - started:.2f} s, engine {ended - between:.2f} s", file=sys.stderr)
    low, high = np.quantile(ratios, [0.1, 0.9])
    row = {"what": f"time of the diffusers loop over the engine, {len(NUM_STEPS) * len(GUIDANCE)} settings x {num} pictures"}
    rows = [
        {**row, "value": float(np.median(ratios)), "unit": "ratio", "low": float(low), "high": float(high)},
        {"what": "largest difference of a latent", "value": difference, "unit": "", "low": difference, "high": difference},
    ]
    targets = [
        {"what": "no slower than the loop", "value": rows[0]["value"], "target": ">= 1", "met": bool(rows[0]["value"] >= 1)},
        {"what": "the same latents", "value": difference, "target": "<= 1e-3", "met": difference <= 1e-3},
    ]
    print(json.dumps({"benchmark": "engine", "machine": provenance(), "rows": rows, "targets": targets}))


if __name__ == "__main__":
    main()
