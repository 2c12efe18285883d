"""On a GPU: what playing recorded passes back is worth to small networks, in training and in sampling.

    python benchmarks/graphs.py [--json] [--widths 8 32 64 128] [--side 8]

Each width in turns within one process: images a second of the training loop, plain and with `train.cuda_graphs`, 64 images a
step as the studies take; passes a second of the network without gradients, plain and played back, 512 rows a call. Random
weights and batches: time, never quality. fp32. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import print_results, row
from torch import nn

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.models.cuda_graph import CudaGraphModule
from isocost.models.flops import model_cost
from isocost.models.unet import build_unet
from isocost.training.throughput_estimate import RandomTask
from isocost.training.trainer import Trainer, make_accelerator

NUM_TOKENS, CONTEXT_WIDTH, CHANNELS = 16, 384, 8
BATCH, ROWS, TURNS, STEPS, PASSES = 64, 512, 5, 20, 20


def training(model: ModelSpec, cuda_graphs: bool, folder: Path) -> Callable[[], int]:
    """Steps of a training, warm."""
    spec = TrainSpec(num_images=1 << 40, batch_size=BATCH, cuda_graphs=cuda_graphs)
    trainer = Trainer(
        spec, RandomTask(model, NUM_TOKENS), build_unet(model), folder, make_accelerator(spec, folder, "benchmark")
    )
    if cuda_graphs:
        trainer.record(0)
    batch, seen = trainer.batch(0), 0

    def run() -> int:
        nonlocal seen
        for _ in range(STEPS):
            trainer.step(batch, seen)
            seen += BATCH
        return STEPS * BATCH

    run()
    return run


def sampling(network: nn.Module, model: ModelSpec, played_back: bool) -> Callable[[], int]:
    """Passes of a network, warm."""
    x = torch.randn(ROWS, model.latent_channels, model.latent_size, model.latent_size, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    times, states = torch.full((ROWS,), 500.0, device="cuda"), torch.randn(ROWS, NUM_TOKENS, CONTEXT_WIDTH, device="cuda")
    call: Any = CudaGraphModule(network) if played_back else network

    @torch.inference_mode()
    def run() -> int:
        for _ in range(PASSES):
            call(x, times, states)
        return PASSES * ROWS

    run()
    return run


def in_turns(ways: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
    """Rates of each way, `TURNS` of them."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, run in ways.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            done = run()
            torch.cuda.synchronize()
            rates[name].append(done / (time.perf_counter() - started))
    return rates


def rows_of(width: int, side: int) -> list[dict[str, Any]]:
    """Rates and ratios of one width."""
    model = ModelSpec(width=width, latent_channels=CHANNELS, latent_size=side, cross_attention_dim=CONTEXT_WIDTH)
    size = model_cost(model, NUM_TOKENS).size
    with tempfile.TemporaryDirectory() as folder:
        trained = in_turns({way: training(model, way == "played back", Path(folder) / way) for way in ("plain", "played back")})
    network = build_unet(model).cuda().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    sampled = in_turns({way: sampling(network, model, way == "played back") for way in ("plain", "played back")})
    rows = []
    for what, unit, rates in (("training", "images/s", trained), ("sampling", "passes/s", sampled)):
        name = f"{what} {size} (width {width}), {side} x {side}"
        rows += [row(f"{name}, {way}", values, unit) for way, values in rates.items()]
        ratios = [played / plain for played, plain in zip(rates["played back"], rates["plain"], strict=True)]
        rows.append(row(f"{name}: played back / plain", ratios, "times"))
    return rows


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="the JSON line alone, which is all there is")
    options.add_argument("--widths", type=int, nargs="+", default=[8, 32, 64, 128])
    options.add_argument("--side", type=int, default=8)
    asked = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: graphs are recorded on CUDA devices")
    rows: list[dict[str, Any]] = []
    for width in asked.widths:
        of_width = rows_of(width, asked.side)
        if not asked.json:
            print(json.dumps(of_width), file=sys.stderr, flush=True)  # what is there if the device's time runs out
        rows += of_width
    print_results("graphs", rows, [])


if __name__ == "__main__":
    main()
