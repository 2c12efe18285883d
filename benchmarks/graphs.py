"""CUDA graphs on a GPU: their speed-up of small networks in training and in sampling.

    python benchmarks/graphs.py [--quick] [--json] [--widths 8 32 64 128] [--latent-size 8]

For each width, both ways run in turns within one process: images/s of the trainer with and without `train.cuda_graphs`, with
64 images per step as in the studies; and forward passes/s of the network without gradients, eager and with a CUDA graph, with
512 samples per call. Weights and batches are random and in fp32, so only time is measured, not quality. The last line is
JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import Row, argument_parser, print_results, row
from torch import nn

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.models.cuda_graph import CudaGraphModule
from isocost.models.flops import model_cost
from isocost.models.unet import build_unet
from isocost.training.throughput_estimate import RandomObjective
from isocost.training.trainer import Trainer, make_accelerator

NUM_TOKENS, EMBED_DIM, CHANNELS = 16, 384, 8
TRAINING_BATCH, SAMPLING_BATCH, STEPS, PASSES = 64, 512, 20, 20
TURNS, QUICK_TURNS = 5, 2
EAGER, GRAPH = "eager", "CUDA graph"


def training(model: ModelSpec, cuda_graphs: bool, folder: Path) -> Callable[[], int]:
    """A function that runs training steps, after a warm-up."""
    spec = TrainSpec(num_images=1 << 40, batch_size=TRAINING_BATCH, cuda_graphs=cuda_graphs)
    trainer = Trainer(
        spec, RandomObjective(model, NUM_TOKENS), build_unet(model), folder, make_accelerator(spec, folder, "benchmark")
    )
    if cuda_graphs:
        trainer.record_graph(0)
    batch, images_seen = trainer.batch(0), 0

    def run() -> int:
        nonlocal images_seen
        for _ in range(STEPS):
            trainer.step(batch, images_seen)
            images_seen += TRAINING_BATCH
        return STEPS * TRAINING_BATCH

    run()
    return run


def sampling(network: nn.Module, model: ModelSpec, cuda_graph: bool) -> Callable[[], int]:
    """A function that runs forward passes, after a warm-up."""
    shape = (SAMPLING_BATCH, model.latent_channels, model.latent_size, model.latent_size)
    latents = torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last)
    timesteps = torch.full((SAMPLING_BATCH,), 500.0, device="cuda")
    prompt_embeds = torch.randn(SAMPLING_BATCH, NUM_TOKENS, EMBED_DIM, device="cuda")
    forward: Any = CudaGraphModule(network) if cuda_graph else network

    @torch.inference_mode()
    def run() -> int:
        for _ in range(PASSES):
            forward(latents, timesteps, prompt_embeds)
        return PASSES * SAMPLING_BATCH

    run()
    return run


def measure_in_turns(functions: dict[str, Callable[[], int]], turns: int) -> dict[str, list[float]]:
    """Rates of functions that return their amount of work, one rate per turn."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, run in functions.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            amount = run()
            torch.cuda.synchronize()
            rates[name].append(amount / (time.perf_counter() - started))
    return rates


def width_rows(width: int, latent_size: int, turns: int) -> list[Row]:
    """Rates and ratios of one width."""
    model = ModelSpec(width=width, latent_channels=CHANNELS, latent_size=latent_size, cross_attention_dim=EMBED_DIM)
    size = model_cost(model, NUM_TOKENS).size
    ways = (EAGER, GRAPH)
    with tempfile.TemporaryDirectory() as folder:
        training_rates = measure_in_turns(
            {way: training(model, way == GRAPH, Path(folder) / str(number)) for number, way in enumerate(ways)}, turns
        )
    network = build_unet(model).cuda().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    sampling_rates = measure_in_turns({way: sampling(network, model, way == GRAPH) for way in ways}, turns)
    rows = []
    for what, unit, rates in (("training", "images/s", training_rates), ("sampling", "samples/s", sampling_rates)):
        name = f"{what} {size} (width {width}), {latent_size} x {latent_size}"
        rows += [row(f"{name}, {way}", values, unit) for way, values in rates.items()]
        ratios = [graph / eager for graph, eager in zip(rates[GRAPH], rates[EAGER], strict=True)]
        rows.append(row(f"{name}, {GRAPH} / {EAGER}", ratios, "ratio"))
    return rows


def main() -> None:
    parser = argument_parser(__doc__, quick="one width, two turns, under a minute")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32, 64, 128], help="widths of the networks")
    parser.add_argument("--latent-size", type=int, default=8, help="height and width of the latents")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU found: CUDA graphs need one")
    rows: list[Row] = []
    for width in arguments.widths[:1] if arguments.quick else arguments.widths:
        measured = width_rows(width, arguments.latent_size, QUICK_TURNS if arguments.quick else TURNS)
        if not arguments.json:
            for line in measured:
                print(json.dumps(line), file=sys.stderr, flush=True)
        rows += measured
    print_results("graphs", rows, [])


if __name__ == "__main__":
    main()
