"""Sampling on a GPU: correctness against the CPU, and speed against diffusers.

    python benchmarks/gpu.py [--quick] [--json] [--widths 64 96 ...] [--latent-size 64] [--device cuda]

First, correctness: the integers of the counter-based generator equal those of the CPU, its normals differ by at most one ulp,
an image does not depend on the other images of its batch, and images are close to those of the CPU. Then, in turns within one
process, latents/s of (a) a DDIM loop over diffusers' U-Net and scheduler with batch 16, eager, (b) the same loop, compiled
and channels_last, and (c) the engine, compiled, all in bf16. Weights are random, so only time is measured, not quality. The
fraction of the peak is that of the network's FLOPs against dense bf16. `--quick --device cpu` checks the script without a
GPU. The last line is JSON.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from gpu_training import training_rows, training_targets
from results import Row, argument_parser, print_results
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

NUM_STEPS, GUIDANCE, LOOP_BATCH, BATCH_SIZE, TURNS, QUICK_TURNS = 10, 7.5, 16, 64, 3, 2
QUICK_WIDTH, QUICK_LATENT_SIZE = 16, 8
SMALL, LARGE = {"over_loop": 3.0}, {"over_loop": 1.5, "over_compiled_loop": 1.0}
MIN_RATIOS = {(64, 64): SMALL, (96, 64): SMALL, (128, 64): SMALL, (320, 64): LARGE}
"""Minimum speed of the engine relative to the loops, by width and latent size."""
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Peak of dense bf16, from the manufacturers' data sheets."""


def model_spec(width: int, latent_size: int) -> ModelSpec:
    """A U-Net for latents of 4 channels, with the paper's cross-attention width."""
    return ModelSpec(width=width, latent_channels=4, latent_size=latent_size, cross_attention_dim=PAPER_CROSS_ATTENTION_DIM)


def make_engine(network: nn.Module, latent_size: int, prompt_embeds: Tensor, dtype: DTypeName, compiled: bool) -> Engine:
    """An engine with a copy of the network; the last of the embeddings [N + 1, T, D] is the unconditional one."""
    denoiser = Denoiser(copy.deepcopy(network), dtype, compiled)
    projected = denoiser.project(prompt_embeds)
    return Engine(
        denoiser.denoise(),
        "v_prediction",
        lambda i: projected[i.to(projected.device)],
        projected[-1],
        (4, latent_size, latent_size),
        BATCH_SIZE,
        denoiser.device,
    )


def endless_requests(num_prompts: int) -> Iterator[SampleRequest]:
    """An endless stream of DDIM requests with guidance."""
    table = solver_coefficients(SolverSpec(), NUM_STEPS, NoiseSchedule.scaled_linear())
    return (SampleRequest(i, i % num_prompts, table, GUIDANCE) for i in itertools.count())


def correctness(device: str) -> list[Row]:
    """Targets of correctness."""
    counter = torch.arange(4 * 4096).view(4, -1)
    key = torch.tensor([[7], [11]])
    same_integers = torch.equal(philox4x32(counter, key), philox4x32(counter.to(device), key.to(device)).cpu())
    ids = torch.arange(512)
    on_cpu, on_device = philox_normal(3, ids, 1, (4, 8, 8), "cpu"), philox_normal(3, ids, 1, (4, 8, 8), device).cpu()
    ulps = float(((on_cpu - on_device).abs() / torch.from_numpy(np.spacing(on_cpu.abs().numpy()))).max())
    torch.manual_seed(0)
    network = build_unet(model_spec(16, 8)).eval().requires_grad_(False)
    prompt_embeds = torch.randn(6, PAPER_NUM_TOKENS, PAPER_CROSS_ATTENTION_DIM)
    requests = list(itertools.islice(endless_requests(5), 40))

    def sample(engine: Engine, requests: list[SampleRequest]) -> dict[int, Tensor]:
        return {result.request.sample_index: result.latent.cpu() for result in engine.run(requests)}

    cpu_latents = sample(make_engine(network.to("cpu"), 8, prompt_embeds, "fp32", False), requests)
    engine = make_engine(network.to(device), 8, prompt_embeds, "fp32", False)
    latents = sample(engine, requests)
    single = {index: latent for request in requests[:5] for index, latent in sample(engine, [request]).items()}
    same_bits = all(torch.equal(single[i], latents[i]) for i in single)
    difference = max(float((latents[i] - cpu_latents[i]).norm() / cpu_latents[i].norm()) for i in cpu_latents)
    return [
        {"what": "counter-based integers on device and CPU", "value": same_integers, "target": "equal", "met": same_integers},
        {"what": "normals on device and CPU", "value": ulps, "target": "<= 1 ulp", "met": ulps <= 1},
        {
            "what": "one image in a batch of its own and in a full batch",
            "value": same_bits,
            "target": "equal",
            "met": same_bits,
        },
        {
            "what": "fp32 latents on device and CPU",
            "value": difference,
            "target": "<= 1e-2 relative (TF32 off)",
            "met": difference <= 1e-2,
        },
    ]


class Loop:
    """diffusers' U-Net and DDIM scheduler in a loop, `LOOP_BATCH` latents per call with guidance."""

    def __init__(
        self, network: UNet2DConditionModel, latent_size: int, prompt_embeds: Tensor, dtype: torch.dtype, compiled: bool
    ) -> None:
        network = copy.deepcopy(network).to(dtype)
        self.network: Any = network
        if compiled:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.network = torch.compile(network, mode="max-autotune")
        self.dtype, self.device = dtype, next(network.parameters()).device
        self.shape = (LOOP_BATCH, 4, latent_size, latent_size)
        unconditional, conditional = (embeds.expand(LOOP_BATCH, -1, -1) for embeds in (prompt_embeds[-1:], prompt_embeds[:1]))
        self.prompt_embeds = torch.cat([unconditional, conditional]).to(self.device, dtype)
        self.scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)

    @torch.inference_mode()
    def __call__(self) -> int:
        self.scheduler.set_timesteps(NUM_STEPS, device=self.device)
        x = torch.randn(self.shape, device=self.device, dtype=self.dtype)
        for timestep in self.scheduler.timesteps:
            unconditional, conditional = self.network(torch.cat([x, x]), timestep, self.prompt_embeds).sample.chunk(2)
            output = unconditional + GUIDANCE * (conditional - unconditional)
            x = self.scheduler.step(output, timestep, x).prev_sample
        return LOOP_BATCH


class Stream:
    """The engine with all slots occupied."""

    def __init__(self, engine: Engine, num_prompts: int) -> None:
        self.results = engine.run(endless_requests(num_prompts))

    def __call__(self) -> int:
        for _ in range(BATCH_SIZE):
            next(self.results)
        return BATCH_SIZE


def speed(width: int, latent_size: int, device: str, dtype: DTypeName, compiled: bool, turns: int) -> Row:
    """Latents/s of the engine, as the median of turns, and ratios to the loops."""
    torch.manual_seed(0)
    network = build_unet(model_spec(width, latent_size)).to(device).eval().requires_grad_(False)
    prompt_embeds = torch.randn(6, PAPER_NUM_TOKENS, PAPER_CROSS_ATTENTION_DIM)
    loop_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    ways: dict[str, Callable[[], int]] = {"loop": Loop(network, latent_size, prompt_embeds, loop_dtype, False)}
    if compiled:
        ways["compiled_loop"] = Loop(network, latent_size, prompt_embeds, loop_dtype, True)
    ways["engine"] = Stream(make_engine(network, latent_size, prompt_embeds, dtype, compiled), 5)
    for run in ways.values():
        run()
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, run) in itertools.product(range(turns), ways.items()):
        _synchronize(device)
        started = time.perf_counter()
        num_latents = run()
        _synchronize(device)
        rates[way].append(num_latents / (time.perf_counter() - started))
    cost = model_cost(model_spec(width, latent_size))
    medians = {way: sorted(values)[len(values) // 2] for way, values in rates.items()}
    tflops = medians["engine"] * 2 * NUM_STEPS * cost.gflop_per_forward / 1000
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((value for model, value in PEAK_TFLOPS.items() if model in name), None)
    return {
        "what": f"{cost.size} (width {width}), {latent_size}x{latent_size} latents",
        "value": medians["engine"],
        "unit": f"latents/s with {NUM_STEPS} guided steps",
        "ms_per_evaluation": 1000 / (medians["engine"] * 2 * NUM_STEPS),
        "tflops": tflops,
        "fraction_of_peak": tflops / peak if peak and dtype == "bf16" else None,
        **{f"over_{way}": medians["engine"] / medians[way] for way in ways if way != "engine"},
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    quick = (
        f"width {QUICK_WIDTH}, {QUICK_LATENT_SIZE} x {QUICK_LATENT_SIZE} latents, fp32, without torch.compile; under a minute"
    )
    parser = argument_parser(__doc__, quick=quick)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[size.width for size in TABLE_1], help="widths of the networks"
    )
    parser.add_argument("--latent-size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--training", action="store_true", help="measure training steps too (gpu_training.py)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU found; --quick --device cpu checks the script")
    if arguments.quick:
        arguments.widths, arguments.latent_size = [QUICK_WIDTH], QUICK_LATENT_SIZE
        arguments.dtype, arguments.eager = "fp32", True
    turns = QUICK_TURNS if arguments.quick else TURNS

    def log(row: Row) -> None:
        if not arguments.json:
            print(json.dumps(row), file=sys.stderr, flush=True)

    targets, rows = correctness(arguments.device), []
    for target in targets:
        log(target)
    for width in arguments.widths:
        row = speed(width, arguments.latent_size, arguments.device, arguments.dtype, not arguments.eager, turns)
        rows.append(row)
        log(row)
        for ratio, bound in MIN_RATIOS.get((width, arguments.latent_size), {}).items():
            if ratio in row:
                what = f"width {width}: engine {ratio.replace('_', ' ')}"
                targets.append({"what": what, "value": row[ratio], "target": f">= {bound}", "met": row[ratio] >= bound})
    if arguments.training:
        measured = training_rows(
            arguments.device, arguments.widths, (arguments.latent_size,), compiled=not arguments.eager, log=log
        )
        rows += measured
        targets += training_targets(measured)
    print_results("gpu", rows, targets)


if __name__ == "__main__":
    main()
