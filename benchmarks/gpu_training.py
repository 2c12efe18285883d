"""Training on a GPU: images/s of the trainer and fraction of the dense bf16 peak, for all sizes that fit.

    python benchmarks/gpu_training.py [--quick] [--json] [--widths 64 96 ...] [--latent-sizes 32 64] [--device cuda]

Batches are random numbers on the device and weights are random, so only the time of network, optimizer and EMA is measured,
not quality. FLOPs are 3 x forward x images. `--quick --device cpu` checks the script without a GPU. Other benchmarks use
`training_rows(device)`. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from results import Row, argument_parser, at_least, print_results, row

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.errors import ConfigError
from isocost.models.flops import model_cost
from isocost.models.paper_table import PAPER_CROSS_ATTENTION_DIM, PAPER_NUM_TOKENS, TABLE_1
from isocost.models.unet import build_unet
from isocost.training.throughput_estimate import RandomObjective
from isocost.training.trainer import Trainer, make_accelerator

WIDTHS = tuple(row.width for row in TABLE_1)
LATENT_SIZES = (32, 64)
BATCH, WARM_UPS, STEPS = 256, 3, 10
QUICK_LATENT_SIZE, QUICK_BATCH = 8, 16
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Peak of dense bf16, from the manufacturers' data sheets."""
MIN_PEAK_FRACTION, MIN_PEAK_FRACTION_FROM_WIDTH = 0.40, 128


def training_rows(
    device: str,
    widths: Sequence[int] = WIDTHS,
    latent_sizes: Sequence[int] = LATENT_SIZES,
    batch: int = BATCH,
    compiled: bool = True,
    log: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure sizes: a row with images/s, and one with the fraction of the peak if it is known; one row if it does not fit."""
    rows: list[Row] = []
    for latent_size in latent_sizes:
        for width in widths:
            measured = _size_rows(device, width, latent_size, batch, compiled)
            for result in measured:
                log(result)
            rows += measured
            if device != "cpu":
                torch.accelerator.empty_cache()
    return rows


def _size_rows(device: str, width: int, latent_size: int, batch: int, compiled: bool) -> list[Row]:
    model = ModelSpec(width=width, latent_size=latent_size, cross_attention_dim=PAPER_CROSS_ATTENTION_DIM)
    cost = model_cost(model, PAPER_NUM_TOKENS)
    name = f"training {cost.size}, {latent_size} x {latent_size}"
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
        fractions = [3 * cost.gflop_per_forward * rate / (1000 * peak) for rate in rates]
        rows.append(row(f"{name}, fraction of the dense bf16 peak", fractions, "fraction", width=width))
    return rows


def _images_per_second(model: ModelSpec, spec: TrainSpec) -> list[float]:
    """Images per second of each of `STEPS` steps after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(spec, Path(folder), "benchmark")
        trainer = Trainer(spec, RandomObjective(model, PAPER_NUM_TOKENS), build_unet(model), Path(folder), accelerator)
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
    """Targets of larger sizes: the minimum fraction of the peak."""
    large = [row for row in rows if row["unit"] == "fraction" and row["width"] >= MIN_PEAK_FRACTION_FROM_WIDTH]
    return at_least(large, {row["what"]: MIN_PEAK_FRACTION for row in large})


def main() -> None:
    quick = f"one size, {QUICK_LATENT_SIZE} x {QUICK_LATENT_SIZE} latents, without torch.compile; under a minute"
    parser = argument_parser(__doc__, quick=quick)
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), help="widths of the networks")
    parser.add_argument("--latent-sizes", type=int, nargs="*", default=list(LATENT_SIZES), help="heights of the latents")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per step; the microbatch is found automatically")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU found; --quick --device cpu checks the script")
    if arguments.quick:
        arguments.widths, arguments.latent_sizes = arguments.widths[:1], [QUICK_LATENT_SIZE]
        arguments.batch, arguments.eager = QUICK_BATCH, True

    def log(row: Row) -> None:
        if not arguments.json:
            print(json.dumps(row), file=sys.stderr, flush=True)

    rows = training_rows(arguments.device, arguments.widths, arguments.latent_sizes, arguments.batch, not arguments.eager, log)
    print_results("gpu_training", rows, training_targets(rows))


if __name__ == "__main__":
    main()
