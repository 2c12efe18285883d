"""On a GPU: is sampling right there, and how fast is it against diffusers?

    python benchmarks/gpu.py [--json] [--widths 64 96 ...] [--side 64] [--device cuda]

First correctness: the counter-based integers bit for bit and the normals to one ulp as on the CPU, an image's bits whatever
shares its batch, and images near the CPU's. Then, in turns within one process, latents a second of (a) a DDIM loop over
diffusers' U-Net and scheduler at batch 16, eager, (b) the same compiled and channels_last, and (c) the engine, compiled, all
in bf16 on the same random weights: time, never quality. The share of peak counts the network's FLOPs against dense bf16.
Everything runs on a CPU too (`--device cpu --widths 16 --side 8 --precision fp32 --eager`), to test the script. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from gpu_training import training_rows, training_targets
from results import print_results
from torch import Tensor, nn

from isocost.config.model import ModelSpec
from isocost.config.sampling import SolverSpec
from isocost.config.types import DTypeName
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.philox import philox4x32, philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.flops import model_cost
from isocost.models.paper_table import PAPER_CROSS_ATTENTION_DIM, PAPER_NUM_TOKENS, TABLE_1
from isocost.models.unet import build_unet
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine
from isocost.sampling.request import SampleRequest

NUM_STEPS, GUIDANCE, LOOP_BATCH, BUCKET_SIZE, TURNS = 10, 7.5, 16, 64, 3
SMALL, LARGE = {"over_loop": 3.0}, {"over_loop": 1.5, "over_tuned_loop": 1.0}
LEAST_RATIOS = {(64, 64): SMALL, (96, 64): SMALL, (128, 64): SMALL, (320, 64): LARGE}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, from the makers' data sheets."""


def spec_of(width: int, side: int) -> ModelSpec:
    """A member of the family at latents of 4 x side x side, with the paper's context."""
    return ModelSpec(width=width, latent_channels=4, latent_size=side, cross_attention_dim=PAPER_CROSS_ATTENTION_DIM)


def engine_of(network: nn.Module, side: int, states: Tensor, dtype: DTypeName, compiled: bool) -> Engine:
    """The engine around a copy of the network; `states` [N + 1, L, D], the last one null."""
    prepared = Denoiser(copy.deepcopy(network), dtype, compiled)
    projected = prepared.project(states)
    return Engine(
        prepared.denoise(),
        "v_prediction",
        lambda i: projected[i.to(projected.device)],
        projected[-1],
        (4, side, side),
        BUCKET_SIZE,
        prepared.device,
    )


def rows_forever(num_captions: int) -> Any:
    """Guided DDIM rows without end."""
    table = solver_coefficients(SolverSpec(), NUM_STEPS, NoiseSchedule.scaled_linear())
    return (SampleRequest(i, i % num_captions, table, GUIDANCE) for i in itertools.count())


def correctness(device: str) -> list[dict[str, Any]]:
    """Each line: what, value, target, met."""
    counter = torch.arange(4 * 4096).view(4, -1)
    key = torch.tensor([[7], [11]])
    integers = torch.equal(philox4x32(counter, key), philox4x32(counter.to(device), key.to(device)).cpu())
    ids = torch.arange(512)
    here, there = philox_normal(3, ids, 1, (4, 8, 8), "cpu"), philox_normal(3, ids, 1, (4, 8, 8), device).cpu()
    ulps = float(((here - there).abs() / torch.from_numpy(np.spacing(here.abs().numpy()))).max())
    torch.manual_seed(0)
    network = build_unet(spec_of(16, 8)).eval().requires_grad_(False)
    states = torch.randn(6, PAPER_NUM_TOKENS, PAPER_CROSS_ATTENTION_DIM)
    rows = list(itertools.islice(rows_forever(5), 40))
    made = {}
    for where in ("cpu", device):
        engine = engine_of(network.to(where), 8, states, "fp32", False)
        made[where] = {done.row.sample_index: done.latent.cpu() for done in engine.run(rows)}
    alone = {done.row.sample_index: done.latent.cpu() for row in rows[:5] for done in engine.run([row])}
    same = all(torch.equal(alone[i], made[device][i]) for i in alone)
    apart = max(float((made[device][i] - made["cpu"][i]).norm() / made["cpu"][i].norm()) for i in made["cpu"])
    return [
        {"what": "counter-based integers as on the CPU", "value": integers, "target": "bit for bit", "met": integers},
        {"what": "normals against the CPU's", "value": ulps, "target": "<= 1 ulp", "met": ulps <= 1},
        {"what": "an image alone and in a full batch", "value": same, "target": "bit for bit", "met": same},
        {
            "what": "fp32 images against the CPU's",
            "value": apart,
            "target": "<= 1e-2 relative (TF32 off)",
            "met": apart <= 1e-2,
        },
    ]


class Loop:
    """diffusers' U-Net and DDIM scheduler in a loop, `LOOP_BATCH` latents a call with guidance."""

    def __init__(self, network: UNet2DConditionModel, side: int, states: Tensor, dtype: torch.dtype, tuned: bool) -> None:
        network = copy.deepcopy(network).to(dtype)
        self.network: Any = network
        if tuned:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.network = torch.compile(network, mode="max-autotune")
        self.side, self.dtype, self.device = side, dtype, next(network.parameters()).device
        self.context = torch.cat([states[-1:].expand(LOOP_BATCH, -1, -1), states[:1].expand(LOOP_BATCH, -1, -1)])
        self.context = self.context.to(self.device, dtype)
        self.scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)

    @torch.inference_mode()
    def __call__(self) -> int:
        self.scheduler.set_timesteps(NUM_STEPS, device=self.device)
        x = torch.randn(LOOP_BATCH, 4, self.side, self.side, device=self.device, dtype=self.dtype)
        for timestep in self.scheduler.timesteps:
            unconditional, conditional = self.network(torch.cat([x, x]), timestep, self.context).sample.chunk(2)
            output = unconditional + GUIDANCE * (conditional - unconditional)
            x = self.scheduler.step(output, timestep, x).prev_sample
        return LOOP_BATCH


class Stream:
    """The engine at steady state."""

    def __init__(self, engine: Engine, num_captions: int) -> None:
        self.finished = engine.run(rows_forever(num_captions))

    def __call__(self) -> int:
        for _ in range(BUCKET_SIZE):
            next(self.finished)
        return BUCKET_SIZE


def speed(width: int, side: int, device: str, dtype: DTypeName, compiled: bool) -> dict[str, Any]:
    """Latents a second of each way, the median of `TURNS` turns, and their ratios."""
    torch.manual_seed(0)
    network = build_unet(spec_of(width, side)).to(device).eval().requires_grad_(False)
    states = torch.randn(6, PAPER_NUM_TOKENS, PAPER_CROSS_ATTENTION_DIM)
    loop_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    ways: dict[str, Callable[[], int]] = {"loop": Loop(network, side, states, loop_dtype, False)}
    if compiled:
        ways["tuned loop"] = Loop(network, side, states, loop_dtype, True)
    ways["engine"] = Stream(engine_of(network, side, states, dtype, compiled), 5)
    for run in ways.values():
        run()
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, run) in itertools.product(range(TURNS), ways.items()):
        _wait(device)
        started = time.perf_counter()
        done = run()
        _wait(device)
        rates[way].append(done / (time.perf_counter() - started))
    cost = model_cost(spec_of(width, side))
    middle = {way: sorted(values)[len(values) // 2] for way, values in rates.items()}
    tflops = middle["engine"] * 2 * NUM_STEPS * cost.gflop_per_forward / 1000
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((value for model, value in PEAK_TFLOPS.items() if model in name), None)
    return {
        "what": f"{cost.size} (width {width}), {side}x{side} latents",
        "value": middle["engine"],
        "unit": f"latents/s at {NUM_STEPS} guided steps",
        "ms_per_evaluation": 1000 / (middle["engine"] * 2 * NUM_STEPS),
        "tflops": tflops,
        "share_of_peak": tflops / peak if peak and dtype == "bf16" else None,
        **{f"over_{way.replace(' ', '_')}": middle["engine"] / middle[way] for way in ways if way != "engine"},
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--device", default="cuda")
    options.add_argument("--widths", type=int, nargs="+", default=[row.width for row in TABLE_1])
    options.add_argument("--side", type=int, default=64)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--eager", action="store_true", help="compile nothing")
    options.add_argument("--training", action="store_true", help="steps of training as well (gpu_training.py)")
    asked = options.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --widths 16 --side 8 --precision fp32 --eager tests the script")
    targets, rows = correctness(asked.device), []
    for width in asked.widths:
        rows.append(speed(width, asked.side, asked.device, asked.dtype, not asked.eager))
        if not asked.json:
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for ratio, bound in LEAST_RATIOS.get((width, asked.side), {}).items():
            if ratio in rows[-1]:
                value = rows[-1][ratio]
                targets.append(
                    {"what": f"width {width}: {ratio}", "value": value, "target": f">= {bound}", "met": value >= bound}
                )
    if asked.training:
        trained = training_rows(asked.device, asked.widths, (asked.side,), compiled=not asked.eager)
        rows += trained
        targets += training_targets(trained)
    print_results("gpu", rows, targets)


if __name__ == "__main__":
    main()
