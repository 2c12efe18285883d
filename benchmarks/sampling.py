"""Sampling from prompts to images: images/s of diffusers' pipeline and of the engine, with the same network and steps.

    python benchmarks/sampling.py [--quick] [--json] [--compile] [--mixed]

Three ways run in turns within one process: (a) StableDiffusionPipeline with one prompt per call, (b) with 16 prompts per
call, both eager as in diffusers' documentation, (c) the engine with all slots occupied and prompts encoded in advance, as in
a sweep. Two sizes of the family are measured, with latents of 4 x 8 x 8 and the shipped autoencoder and text encoder. The
last part compares network evaluations per second of a mixed grid (guidance x steps x solvers) with those of a single setting.
Weights are random, so only time is measured, not quality. The last line is JSON.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from results import Row, argument_parser, at_least, print_results, row

from isocost.config.data import ScenesSource
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.sampling import SolverSpec
from isocost.data.latent_cache import load_images
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.autoencoder import load_autoencoder
from isocost.models.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint, save_networks
from isocost.models.export_diffusers import export
from isocost.models.flops import model_cost
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.models.unet import build_unet
from isocost.sampling.generate import PromptEmbeds, generate, make_engine
from isocost.sampling.request import SampleRequest
from isocost.utils.artifact_store import Store

WIDTHS = (16, 64)
NUM_STEPS, GUIDANCE = 20, 4.0
BATCH_SIZE = 64
TEXT_ENCODER = TextEncoderSpec(max_tokens=16)
MIXED = {
    "guidance": (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    "num_steps": (2, 4, 6, 8, 10, 20),
    "solver": ("ddim", "ddpm", "dpmsolver++2m"),
}


def random_checkpoint(out: Path, width: int) -> Path:
    """Write a checkpoint folder with random weights for latents of 4 x 8 x 8."""
    torch.manual_seed(0)
    spec = ModelSpec(width=width, latent_channels=4, latent_size=8, cross_attention_dim=384)
    cost = model_cost(spec, TEXT_ENCODER.max_tokens)
    info = CheckpointInfo(
        model=spec,
        size=cost.size,
        num_parameters=cost.num_parameters,
        images_seen=0,
        gflop_per_forward=cost.gflop_per_forward,
        normalized_cost_per_step=cost.normalized_cost_per_step,
        prediction_type="v_prediction",
        autoencoder="scenes",
        text_encoder=TEXT_ENCODER,
        resolution=32,
    )
    store = Store(out)
    with store.create("checkpoint", f"width{width}", {"info": info.model_dump(mode="json")}) as folder:
        save_networks(folder, build_unet(spec), "v_prediction")
    return store.folder("checkpoint", f"width{width}")


class Loop:
    """diffusers' pipeline with `batch` prompts per call."""

    def __init__(self, pipeline: StableDiffusionPipeline, prompts: list[str], batch: int) -> None:
        self.pipeline, self.batch, self.prompts = pipeline, batch, itertools.cycle(prompts)

    def __call__(self, num_calls: int) -> int:
        for _ in range(num_calls):
            prompts = list(itertools.islice(self.prompts, self.batch))
            self.pipeline(prompts, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE, height=32, width=32)
        return num_calls * self.batch


class Stream:
    """The engine, which is not drained between turns: a turn has as many images as are in flight."""

    def __init__(self, checkpoint: Checkpoint, prompts: PromptEmbeds, **options: Any) -> None:
        network = copy.deepcopy(checkpoint.network)
        engine = make_engine(network, checkpoint.info, prompts, batch_size=BATCH_SIZE, **options)
        table = solver_coefficients(SolverSpec(), NUM_STEPS, NoiseSchedule.scaled_linear())
        requests = (SampleRequest(i, i % len(prompts.index), table, GUIDANCE) for i in itertools.count())
        self.in_flight = engine.call_pool.num_slots // 2
        self.batches = generate(engine, load_autoencoder("scenes"), requests)

    def __call__(self, num_calls: int) -> int:
        num_images = 0
        while num_images < num_calls * self.in_flight:
            num_images += len(next(self.batches).results)
        return num_images


def evaluations_per_second(checkpoint: Checkpoint, prompts: PromptEmbeds, mixed: bool, seconds: float) -> Iterator[float]:
    """Network evaluations per second of the engine in windows of `seconds`, without decoding and shared first steps."""
    engine = make_engine(copy.deepcopy(checkpoint.network), checkpoint.info, prompts, batch_size=BATCH_SIZE)
    settings = list(itertools.product(MIXED["guidance"], MIXED["num_steps"], MIXED["solver"])) if mixed else [(4.0, 8, "ddim")]
    generator = np.random.default_rng(0)

    def requests() -> Iterator[SampleRequest]:
        for i in itertools.count():
            guidance, num_steps, solver = settings[generator.integers(len(settings))]
            table = solver_coefficients(SolverSpec(name=solver), num_steps, NoiseSchedule.scaled_linear())
            yield SampleRequest(i, i % len(prompts.index), table, guidance)

    evaluations, started = 0, time.perf_counter()
    for result in engine.run(requests()):
        evaluations += result.nfe
        now = time.perf_counter()
        if now - started > seconds:
            yield evaluations / (now - started)
            evaluations, started = 0, time.perf_counter()


def rate(run: Callable[[int], int], num_calls: int) -> float:
    """Images per second."""
    started = time.perf_counter()
    num_images = run(num_calls)
    return num_images / (time.perf_counter() - started)


def measure(width: int, turns: int, quick: bool, compiled: bool, log: Callable[[str], None]) -> list[Row]:
    """Rates of the three ways at one width, and their ratios in each turn."""
    images = load_images(ScenesSource(kind="scenes", num_images=256, seed=1), 32, 0.0)
    prompts = [captions[0] for captions in images.captions]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(random_checkpoint(Path(folder), width))
        exported = export(checkpoint.folder, Path(folder) / "exported")
        pipeline = StableDiffusionPipeline.from_pretrained(exported, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        started = time.perf_counter()
        prompt_embeds = PromptEmbeds.encode(prompts, MiniLMTextEncoder(TEXT_ENCODER))
        encoding_seconds = time.perf_counter() - started
        ways: dict[str, Callable[[int], int]] = {
            "a": Loop(pipeline, prompts, 1),
            "b": Loop(pipeline, prompts, 16),
            "c": Stream(checkpoint, prompt_embeds),
        }
        rows = [row(f"width {width}: encoding of {len(set(prompts))} prompts", [encoding_seconds], "s")]
        ways["c"](1)
        if compiled:
            started = time.perf_counter()
            ways["d"] = Stream(checkpoint, prompt_embeds, compiled=True)
            ways["d"](1)
            compile_seconds = time.perf_counter() - started
            rows.append(row(f"width {width}: compilation and one turn", [compile_seconds], "s"))
        calls = {"a": 1 if quick else 2, "b": 1, "c": 1, "d": 1}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        ways["a"](1)
        for turn in range(turns):
            for way, run in ways.items():
                rates[way].append(rate(run, calls[way]))
            log(f"width {width}, turn {turn}: " + ", ".join(f"({way}) {values[-1]:.2f}/s" for way, values in rates.items()))
    titles = {
        "a": "(a) pipeline, batch 1",
        "b": "(b) pipeline, batch 16",
        "c": "(c) engine, eager fp32",
        "d": "(d) engine, compiled fp32",
    }
    rows += [row(f"width {width}: {titles[way]}", values, "images/s") for way, values in rates.items()]
    for way in ("c", "d") if compiled else ("c",):
        for baseline in ("a", "b"):
            ratios = [numerator / denominator for numerator, denominator in zip(rates[way], rates[baseline], strict=True)]
            rows.append(row(f"width {width}: ({way}) / ({baseline})", ratios, "ratio"))
    if compiled:
        seconds_saved = 1 / np.median(rates["c"]) - 1 / np.median(rates["d"])
        if seconds_saved > 0:
            break_even = compile_seconds / seconds_saved * NUM_STEPS
            rows.append(row(f"width {width}: break-even of compilation", [break_even], "images x steps"))
    return rows


def mixed_ratio(width: int, windows: int, seconds: float, log: Callable[[str], None]) -> Row:
    """Ratio of evaluations per second of a mixed grid to those of a single setting, in each window."""
    prompts = PromptEmbeds.encode([f"an image of {number}" for number in range(64)], MiniLMTextEncoder(TEXT_ENCODER))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(random_checkpoint(Path(folder), width))
        streams = [evaluations_per_second(checkpoint, prompts, mixed, seconds) for mixed in (True, False)]
        for stream in streams:
            next(stream)
        ratios = []
        for _ in range(windows):
            mixed, uniform = (next(stream) for stream in streams)
            ratios.append(mixed / uniform)
            log(f"width {width}: mixed {mixed:.0f}, uniform {uniform:.0f} evaluations/s")
    return row(f"width {width}: evaluations/s, 144 mixed settings / one setting", ratios, "ratio")


def main() -> None:
    parser = argument_parser(__doc__, quick="one width, two turns, under a minute")
    parser.add_argument("--mixed", action="store_true", help="only the last part: a mixed grid against a single setting")
    parser.add_argument("--compile", action="store_true", help="measure the compiled engine too, which takes minutes")
    arguments = parser.parse_args()
    quick = arguments.quick
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    def log(line: str) -> None:
        if not arguments.json:
            print(line, file=sys.stderr, flush=True)

    rows: list[Row] = []
    for width in () if arguments.mixed else WIDTHS[:1] if quick else WIDTHS:
        rows += measure(width, 2 if quick else 5, quick, arguments.compile, log)
    rows.append(mixed_ratio(WIDTHS[0], 3 if quick else 8, 2.0 if quick else 5.0, log))
    bounds = {rows[-1]["what"]: 0.95}
    for width in WIDTHS:
        bounds |= {f"width {width}: (c) / (a)": 12, f"width {width}: (c) / (b)": 2.5}
    print_results("sampling", rows, at_least(rows, bounds))


if __name__ == "__main__":
    main()
