"""On a GPU: images a second of the training loop and its share of the dense bf16 peak, every size that fits.

    python benchmarks/gpu_training.py [--json] [--widths 64 96 ...] [--sides 32 64] [--device cuda]

`training_rows(device)` is the same for a benchmark that measures more. Batches are random numbers on the device, so this is
the time of the network, the optimizer and the averages; random weights: it measures time, never quality. FLOPs are 3 x
forward x images. `--device cpu --widths 8 --sides 8 --eager` tests the script. The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import Row, at_least, print_results, row

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.errors import ConfigError
from isocost.models.flops import model_cost
from isocost.models.paper_table import PAPER_CROSS_ATTENTION_DIM, PAPER_NUM_TOKENS, TABLE_1
from isocost.models.unet import build_unet
from isocost.training.throughput_estimate import RandomTask
from isocost.training.trainer import Trainer, make_accelerator

WIDTHS = tuple(row.width for row in TABLE_1)
SIDES = (32, 64)
BATCH, WARM_UPS, STEPS = 256, 3, 10
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, from the makers' data sheets."""
LEAST_SHARE, LEAST_SHARE_FROM = 0.40, 128


def training_rows(
    device: str, widths: Sequence[int] = WIDTHS, sides: Sequence[int] = SIDES, batch: int = BATCH, compiled: bool = True
) -> list[dict[str, Any]]:
    """Two rows a size and latent side, images/s and the share of peak where the peak is known; one where it does not fit."""
    rows: list[dict[str, Any]] = []
    for side in sides:
        for width in widths:
            rows += _rows_of(device, width, side, batch, compiled)
            if device != "cpu":
                torch.accelerator.empty_cache()
    return rows


def _rows_of(device: str, width: int, side: int, batch: int, compiled: bool) -> list[dict[str, Any]]:
    model = ModelSpec(width=width, latent_size=side, cross_attention_dim=PAPER_CROSS_ATTENTION_DIM)
    cost = model_cost(model, PAPER_NUM_TOKENS)
    name = f"training {cost.size}, {side} x {side}"
    spec = TrainSpec(num_images=1 << 40, batch_size=batch, dtype="fp32" if device == "cpu" else "bf16", compile=compiled)
    try:
        rates = _images_per_second(model, spec)
    except (torch.OutOfMemoryError, ConfigError) as error:
        return [{"what": name, "value": None, "unit": f"does not fit: {str(error).splitlines()[0][:120]}"}]
    rows = [row(name, rates, "images/s")]
    peak = next(
        (tflops for chip, tflops in PEAK_TFLOPS.items() if device != "cpu" and chip in torch.cuda.get_device_name()), None
    )
    if peak is not None:
        shares = [3 * cost.gflop_per_forward * rate / (1000 * peak) for rate in rates]
        rows.append({**row(f"{name}, share of dense bf16 peak", shares, "share"), "width": width})
    return rows


def _images_per_second(model: ModelSpec, spec: TrainSpec) -> list[float]:
    """The rate of each of `STEPS` steps after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(spec, Path(folder), "benchmark")
        trainer = Trainer(spec, RandomTask(model, PAPER_NUM_TOKENS), build_unet(model), Path(folder), accelerator)
        batch = trainer.batch(0)
        rates = []
        for number in range(WARM_UPS + STEPS):
            started = time.perf_counter()
            trainer.step(batch, number * spec.batch_size)
            if accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            if number >= WARM_UPS:
                rates.append(spec.batch_size / (time.perf_counter() - started))
    return rates


def training_targets(rows: Sequence[Row]) -> list[Row]:
    """The share of peak that is asked of the larger sizes."""
    large = [one for one in rows if one["unit"] == "share" and one["width"] >= LEAST_SHARE_FROM]
    return at_least(large, {one["what"]: LEAST_SHARE for one in large})


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="the JSON line alone, which is all there is")
    options.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS))
    options.add_argument("--sides", type=int, nargs="*", default=list(SIDES))
    options.add_argument("--batch", type=int, default=BATCH, help="images a step; microbatches are found")
    options.add_argument("--eager", action="store_true", help="without torch.compile")
    options.add_argument("--device", default="cuda")
    asked = options.parse_args()
    rows = training_rows(asked.device, asked.widths, asked.sides, asked.batch, not asked.eager)
    print_results("gpu_training", rows, training_targets(rows))


if __name__ == "__main__":
    main()
