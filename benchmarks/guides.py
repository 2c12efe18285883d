"""Images per second of guidance: at every step, in an interval of half of the steps, and by a smaller guide network.

    python benchmarks/guides.py [--quick] [--json] [--compiled] [--turns 7] [--seconds 10]

Four streams of the engine run in turns within one process, with the same main network, solver and number of steps: without
guidance, classifier-free guidance at every step, the same in an interval that covers half of the steps, and a guide of a third
of the width, which has about a ninth of the parameters. Latents are 4 x 8 x 8. Images are not decoded. Weights are random, so
only time is measured, not quality. With `--compiled` all networks are compiled and a call has 256 slots, as in
studies/reference-guides.yaml; otherwise it has 64. The last line is JSON.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from results import Row, argument_parser, at_least, print_results, row
from sampling import BATCH_SIZE, TEXT_ENCODER, random_checkpoint

from isocost.config.sampling import SolverSpec
from isocost.diffusion.guidance import guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.checkpoint import load_checkpoint
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.generate import PromptEmbeds, make_engine
from isocost.sampling.guides import make_guide
from isocost.sampling.request import SampleRequest

WIDTHS = (24, 48)
GUIDE_FRACTION = 3
NUM_STEPS, GUIDANCE = 8, 3.0
INTERVAL_BOUND, GUIDE_BOUND = 1.25, 1.5
COMPILED_BATCH_SIZE = 256


def streams(width: int, folder: Path, prompts: PromptEmbeds, compiled: bool) -> tuple[dict[str, Iterator[int]], float]:
    """Endless streams of finished images by the way of guidance, and main parameters / guide parameters."""
    checkpoint = load_checkpoint(random_checkpoint(folder, width))
    guide = load_checkpoint(random_checkpoint(folder, width // GUIDE_FRACTION))
    solver = solver_coefficients(SolverSpec(), NUM_STEPS, NoiseSchedule.scaled_linear())
    levels = 2 * np.log(solver.alpha / solver.sigma)
    quarter = NUM_STEPS // 4
    half = (float(levels[quarter]), float(levels[3 * quarter]))
    in_interval = guidance_per_evaluation(solver.alpha, solver.sigma, GUIDANCE, half)
    assert sum(weight != 1 for weight in in_interval) == NUM_STEPS // 2
    ways = {
        "no guidance": ((1.0,) * NUM_STEPS, None),
        "classifier-free": ((GUIDANCE,) * NUM_STEPS, None),
        "classifier-free, half of the steps": (in_interval, None),
        "guide": ((GUIDANCE,) * NUM_STEPS, "guide"),
    }

    def stream(weights: tuple[float, ...], name: str | None) -> Iterator[int]:
        batch_size = COMPILED_BATCH_SIZE if compiled else BATCH_SIZE
        network = load_checkpoint(checkpoint.folder).network
        engine = make_engine(network, checkpoint.info, prompts, batch_size=batch_size, compiled=compiled)
        if name is not None:
            guide_network = load_checkpoint(guide.folder).network
            engine.add_guide(name, make_guide(guide_network, guide.info, prompts, compiled=compiled))
        requests = (
            SampleRequest(i, i % len(prompts.index), solver, GUIDANCE, guidance_per_evaluation=weights, guide=name)
            for i in itertools.count()
        )
        for _ in engine.run(requests):
            yield 1

    sizes = checkpoint.info.num_parameters / guide.info.num_parameters
    return {way: stream(*settings) for way, settings in ways.items()}, sizes


def images_per_second(stream: Iterator[int], seconds: float) -> float:
    """Images per second over at least `seconds`."""
    started = time.perf_counter()
    num_images = 0
    while time.perf_counter() - started < seconds:
        num_images += next(stream)
    return num_images / (time.perf_counter() - started)


def measure(width: int, turns: int, seconds: float, compiled: bool, log: Callable[[str], None]) -> list[Row]:
    """Rates of all ways at one width, and ratios to classifier-free guidance at every step in each turn."""
    prompts = PromptEmbeds.encode([f"an image of {number}" for number in range(64)], MiniLMTextEncoder(TEXT_ENCODER))
    with tempfile.TemporaryDirectory() as folder:
        running, sizes = streams(width, Path(folder), prompts, compiled)
        rates: dict[str, list[float]] = {way: [] for way in running}
        for stream in running.values():
            images_per_second(stream, seconds)
        for turn in range(turns):
            for way, stream in running.items():
                rates[way].append(images_per_second(stream, seconds))
            log(f"width {width}, turn {turn}: " + ", ".join(f"{way} {values[-1]:.2f}/s" for way, values in rates.items()))
    rows = [row(f"width {width}: {way}", values, "images/s") for way, values in rates.items()]
    for way in rates:
        ratios = [value / full for value, full in zip(rates[way], rates["classifier-free"], strict=True)]
        rows.append(row(f"width {width}: {way} / classifier-free", ratios, "ratio"))
    return [*rows, row(f"width {width}: parameters / parameters of the guide", [sizes], "ratio")]


def main() -> None:
    parser = argument_parser(__doc__, quick="one width, two turns")
    parser.add_argument("--compiled", action="store_true", help="compile all networks; 256 slots per call")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each way in each turn")
    arguments = parser.parse_args()
    turns, seconds = (2, 3.0) if arguments.quick else (arguments.turns, arguments.seconds)

    def log(line: str) -> None:
        if not arguments.json:
            print(line, file=sys.stderr, flush=True)

    rows: list[Row] = []
    bounds = {}
    for width in WIDTHS[:1] if arguments.quick else WIDTHS:
        rows += measure(width, turns, seconds, arguments.compiled, log)
        bounds[f"width {width}: classifier-free, half of the steps / classifier-free"] = INTERVAL_BOUND
        bounds[f"width {width}: guide / classifier-free"] = GUIDE_BOUND
    print_results("guides", rows, at_least(rows, bounds), compiled=arguments.compiled)


if __name__ == "__main__":
    main()
