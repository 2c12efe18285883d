"""Images a second: diffusers' pipeline in a loop against the engine, prompts to images, the same network and steps.

    python benchmarks/sampling.py [--quick] [--json] [--compile] [--mixed]

Three ways, in turns within one process: (a) StableDiffusionPipeline prompt by prompt, (b) the same 16 prompts at a time, both
eager as diffusers' documentation shows them, (c) the engine at steady state, captions encoded once before as in a sweep.
Two sizes of the family at latents of 4 x 8 x 8, shipped autoencoder and text encoder. A last part compares network
evaluations a second of a mixed grid (guidance x steps x solvers) with a uniform stream. Random weights: this measures time,
never quality. The last line is JSON.
"""

from __future__ import annotations

import argparse
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
from results import at_least, print_results, row

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
BUCKET_SIZE = 64
TEXT = TextEncoderSpec(max_tokens=16)
MIXED = {
    "guidance": (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    "num_steps": (2, 4, 6, 8, 10, 20),
    "solver": ("ddim", "ddpm", "dpmsolver++2m"),
}


def random_checkpoint(out: Path, width: int) -> Path:
    """A checkpoint folder of random weights at 4 x 8 x 8 latents."""
    torch.manual_seed(0)
    spec = ModelSpec(width=width, latent_channels=4, latent_size=8, cross_attention_dim=384)
    cost = model_cost(spec, TEXT.max_tokens)
    info = CheckpointInfo(
        model=spec,
        size=cost.size,
        num_parameters=cost.num_parameters,
        images_seen=0,
        gflop_per_forward=cost.gflop_per_forward,
        normalized_cost_per_step=cost.normalized_cost_per_step,
        prediction_type="v_prediction",
        autoencoder="scenes",
        text=TEXT,
        resolution=32,
    )
    store = Store(out)
    with store.create("checkpoint", f"width{width}", {"info": info.model_dump(mode="json")}) as folder:
        save_networks(folder, build_unet(spec), "v_prediction")
    return store.folder("checkpoint", f"width{width}")


class Loop:
    """diffusers' pipeline, `batch` prompts a call."""

    def __init__(self, pipeline: StableDiffusionPipeline, prompts: list[str], batch: int) -> None:
        self.pipeline, self.batch, self.prompts = pipeline, batch, itertools.cycle(prompts)

    def __call__(self, num_calls: int) -> int:
        for _ in range(num_calls):
            prompts = list(itertools.islice(self.prompts, self.batch))
            self.pipeline(prompts, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE, height=32, width=32)
        return num_calls * self.batch


class Stream:
    """The engine, never drained between two turns: a turn is as many images as are in flight."""

    def __init__(self, checkpoint: Checkpoint, captions: PromptEmbeds, **options: Any) -> None:
        network = copy.deepcopy(checkpoint.network)
        engine = make_engine(network, checkpoint.info, captions, batch_size=BUCKET_SIZE, **options)
        table = solver_coefficients(SolverSpec(), NUM_STEPS, NoiseSchedule.scaled_linear())
        rows = (SampleRequest(i, i % len(captions.number), table, GUIDANCE) for i in itertools.count())
        self.in_flight = engine.lanes.num_places // 2
        self.drawn = generate(engine, load_autoencoder("scenes"), rows)

    def __call__(self, num_calls: int) -> int:
        done = 0
        while done < num_calls * self.in_flight:
            done += len(next(self.drawn).rows)
        return done


def evaluations_per_second(checkpoint: Checkpoint, captions: PromptEmbeds, mixed: bool, seconds: float) -> Iterator[float]:
    """Network evaluations a second of the engine in windows of `seconds`; nothing shared, decoding left out."""
    engine = make_engine(copy.deepcopy(checkpoint.network), checkpoint.info, captions, batch_size=BUCKET_SIZE)
    settings = list(itertools.product(MIXED["guidance"], MIXED["num_steps"], MIXED["solver"])) if mixed else [(4.0, 8, "ddim")]
    order = np.random.default_rng(0)

    def rows() -> Iterator[SampleRequest]:
        for i in itertools.count():
            guidance, num_steps, solver = settings[order.integers(len(settings))]
            table = solver_coefficients(SolverSpec(name=solver), num_steps, NoiseSchedule.scaled_linear())
            yield SampleRequest(i, i % len(captions.number), table, guidance)

    finished = engine.run(rows())
    evaluations, started = 0, time.perf_counter()
    for done in finished:
        evaluations += done.nfe
        now = time.perf_counter()
        if now - started > seconds:
            yield evaluations / (now - started)
            evaluations, started = 0, time.perf_counter()


def rate(run: Callable[[int], int], num_calls: int) -> float:
    """Images a second."""
    started = time.perf_counter()
    done = run(num_calls)
    return done / (time.perf_counter() - started)


def measure(width: int, turns: int, quick: bool, compiled: bool, told: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rates of the three ways at one width, and their ratios turn by turn."""
    images = load_images(ScenesSource(kind="scenes", num_images=256, seed=1), 32, 0.0)
    prompts = [captions[0] for captions in images.captions]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(random_checkpoint(Path(folder), width))
        exported = export(checkpoint.folder, Path(folder) / "exported")
        pipeline = StableDiffusionPipeline.from_pretrained(exported, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        started = time.perf_counter()
        captions = PromptEmbeds.of(prompts, MiniLMTextEncoder(TEXT))
        encoding = time.perf_counter() - started
        ways: dict[str, Callable[[int], int]] = {
            "a": Loop(pipeline, prompts, 1),
            "b": Loop(pipeline, prompts, 16),
            "c": Stream(checkpoint, captions),
        }
        rows = [row(f"width {width}: encoding {len(set(prompts))} captions once", [encoding], "s")]
        ways["c"](1)
        if compiled:
            started = time.perf_counter()
            ways["d"] = Stream(checkpoint, captions, compiled=True)
            ways["d"](1)
            compile_seconds = time.perf_counter() - started
            rows.append(row(f"width {width}: compiling and one turn", [compile_seconds], "s"))
        calls = {"a": 1 if quick else 2, "b": 1, "c": 1, "d": 1}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        ways["a"](1)
        for turn in range(turns):
            for way, run in ways.items():
                rates[way].append(rate(run, calls[way]))
            told(f"width {width}, turn {turn}: " + ", ".join(f"({way}) {values[-1]:.2f}/s" for way, values in rates.items()))
    titles = {
        "a": "(a) pipeline, batch 1",
        "b": "(b) pipeline, batch 16",
        "c": "(c) engine, eager fp32",
        "d": "(d) engine, compiled fp32",
    }
    rows += [row(f"width {width}: {titles[way]}", values, "images/s") for way, values in rates.items()]
    for way in ("c", "d") if compiled else ("c",):
        for other in ("a", "b"):
            ratios = [mine / theirs for mine, theirs in zip(rates[way], rates[other], strict=True)]
            rows.append(row(f"width {width}: {titles[way][:3]} over ({other})", ratios, "ratio"))
    if compiled:
        eager, quick_rate = np.median(rates["c"]), np.median(rates["d"])
        gain = 1 / eager - 1 / quick_rate
        if gain > 0:
            paid = compile_seconds / gain * NUM_STEPS
            rows.append(row(f"width {width}: compiling is paid back after", [paid], "images x steps"))
    return rows


def mixed_against_uniform(width: int, windows: int, seconds: float, told: Callable[[str], None]) -> dict[str, Any]:
    """Evaluations a second of a mixed grid over those of a uniform stream, window by window."""
    prompts = [f"an image of {number}" for number in range(64)]
    captions = PromptEmbeds.of(prompts, MiniLMTextEncoder(TEXT))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(random_checkpoint(Path(folder), width))
        streams = [evaluations_per_second(checkpoint, captions, mixed, seconds) for mixed in (True, False)]
        for stream in streams:
            next(stream)
        ratios = []
        for _ in range(windows):
            mixed, uniform = (next(stream) for stream in streams)
            ratios.append(mixed / uniform)
            told(f"width {width}: mixed {mixed:.0f}, uniform {uniform:.0f} evaluations/s")
    return row(f"width {width}: evaluations/s, 144 settings mixed over one setting", ratios, "ratio")


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="one width, two turns, under a minute")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--mixed", action="store_true", help="the last part alone: a mixed grid against a uniform stream")
    options.add_argument("--compile", action="store_true", help="the compiled engine as well: minutes of compiling")
    asked = options.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    def told(line: str) -> None:
        if not asked.json:
            print(line, file=sys.stderr, flush=True)

    rows: list[dict[str, Any]] = []
    for width in () if asked.mixed else WIDTHS[:1] if asked.quick else WIDTHS:
        rows += measure(width, 2 if asked.quick else 5, asked.quick, asked.compile, told)
    rows.append(mixed_against_uniform(WIDTHS[0], 3 if asked.quick else 8, 2.0 if asked.quick else 5.0, told))
    bounds = {f"width {width}: (c) over (a)": 12 for width in WIDTHS} | {
        f"width {width}: (c) over (b)": 2.5 for width in WIDTHS
    }
    print_results("sampling", rows, at_least(rows, bounds | {rows[-1]["what"]: 0.95}))


if __name__ == "__main__":
    main()
