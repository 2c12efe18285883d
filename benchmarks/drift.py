"""How often `isocost drift` is right: on simulated pairs of equal and unequal models, and on a trained checkpoint.

    python benchmarks/drift.py [--quick] [--json] [--checkpoint FOLDER] [--reference IMAGES] [--images 500] [--pairs 400]

Simulation: features of both sides share the noise of their images, and the variant is shifted so that its true squared MMD is
worse by a planted fraction of that of the base. The tolerance is 5 %. Trained checkpoint, with --reference: fp32 against bf16,
against weights rounded to 8 and to 4 bits, and against DDIM with leading in place of trailing timesteps, at 4 steps. The last
line is JSON.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from results import Row, argument_parser, print_results

from isocost.config.sampling import SolverSpec
from isocost.diffusion.solvers import solver_coefficients
from isocost.evaluation.confidence_intervals import KernelReference, generated_counts, kernel_resamples, percentile_interval
from isocost.evaluation.drift import ScoreDifference, score_difference
from isocost.experiments.drift import Side, compare_sides
from isocost.models.checkpoint import load_checkpoint, open_checkpoint
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.sampling.generate import PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.request import SampleRequest

CHECKPOINT = Path(__file__).parents[1] / "docs/reference/artefacts/checkpoint/fb6817a2d55ba57d"
PROMPTS = (
    "an ankle boot",
    "a pullover",
    "a pair of trousers",
    "a shirt",
    "a coat",
    "a sandal",
    "a sneaker",
    "a dress",
    "a bag",
)
METRIC = "mmd_efficientnet"
NUM_IMAGES, NUM_REFERENCE, WIDTH, NUM_RESAMPLES, SHIFT = 400, 400, 16, 200, 1.2
TOLERANCE, NUM_STEPS = 0.05, 4
PLANTED = (0.0, 0.05, 0.1, 0.2)
"""True losses of the variant, as fractions of the base's score: equal, at the tolerance, two and four times the tolerance."""
OWN_NOISE = 0.005
"""Fraction of the variance of the features that the two sides do not share."""
MAX_FALSE = 0.05


# --- simulation -------------------------------------------------------------------------------------------------------


def simulate(seed: int, loss: float) -> ScoreDifference:
    """Judge a variant whose true squared MMD is worse than that of the base by the fraction `loss`.

    The reference is spherical, so the true squared MMD depends on the length of the shift only. The length that has the wanted
    value is found by bisection on the formula for Gaussians.
    """
    generator = np.random.default_rng(seed)
    reference = KernelReference.of(generator.standard_normal((NUM_REFERENCE, WIDTH)), num_bootstrap=NUM_RESAMPLES, seed=seed)
    counts = generated_counts(NUM_IMAGES, NUM_RESAMPLES, seed)
    shared = generator.standard_normal((NUM_IMAGES, WIDTH))
    sides = []
    for shift in (SHIFT, length_for(squared_mmd_of_shift(SHIFT) * (1 + loss))):
        features = np.sqrt(1 - OWN_NOISE) * shared + np.sqrt(OWN_NOISE) * generator.standard_normal((NUM_IMAGES, WIDTH))
        features[:, 0] += shift
        resamples = kernel_resamples(features, counts, reference)
        sides.append((percentile_interval(resamples), resamples))
    return score_difference(METRIC, *sides, tolerance=TOLERANCE, num_metrics=1, num_images=NUM_IMAGES)


def squared_mmd_of_shift(shift: float) -> float:
    """Squared MMD of N(shift e, I) and N(0, I) under the kernel (x.y / D + 1)³, in closed form.

    With a = x.y / D, E[(a + 1)³] = 1 + 3 E[a] + 3 E[a²] + E[a³] for x, y independent with mean m and unit covariance:
    E[a] = m² / D, E[a²] = (D + 2 m² + m⁴) / D², E[a³] = (3 (D + 2) m² + 6 m⁴ + m⁶) / D³ and the same with one mean zero.
    """

    def mean_kernel(first: float, second: float) -> float:
        product, squares = first * second, first**2 + second**2
        second_moment = WIDTH + squares + product**2
        third_moment = product * (3 * (WIDTH + 2) + 3 * squares + product**2)
        return 1 + 3 * product / WIDTH + 3 * second_moment / WIDTH**2 + third_moment / WIDTH**3

    return mean_kernel(shift, shift) + mean_kernel(0, 0) - 2 * mean_kernel(shift, 0)


def length_for(distance: float) -> float:
    """The shift with this squared MMD."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if squared_mmd_of_shift(middle) < distance else (low, middle)
    return (low + high) / 2


def simulated_rows(num_pairs: int) -> list[Row]:
    """Fractions of verdicts for every planted loss."""
    rows = []
    for loss in PLANTED:
        verdicts = [simulate(seed, loss).verdict for seed in range(num_pairs)]
        rows += [
            {"what": f"true loss {loss:g}: {verdict}", "value": verdicts.count(verdict) / num_pairs, "unit": "fraction"}
            for verdict in ("worse", "not worse", "undecided")
        ]
    return rows


# --- a trained checkpoint ---------------------------------------------------------------------------------------------


@cache
def quantised_checkpoint(folder: str, bits: int) -> Any:
    """A checkpoint whose matrices and convolutions are rounded to `bits` bits, one scale per tensor."""
    checkpoint = load_checkpoint(folder)
    for parameter in checkpoint.network.parameters():
        if parameter.ndim > 1:
            scale = parameter.data.abs().max() / (2 ** (bits - 1) - 1)
            parameter.data = (parameter.data / scale).round() * scale
    return checkpoint


def quantised(prompts: Sequence[str], seeds: Sequence[int], folder: str, bits: int) -> np.ndarray:
    """Images of a quantised checkpoint, for python:drift:quantised."""
    checkpoint, source = quantised_checkpoint(folder, bits), open_checkpoint(folder)
    embeds = PromptEmbeds.encode(list(prompts), load_checkpoint_text_encoder(source, "cpu"))
    engine = make_engine(checkpoint.network, checkpoint.info, embeds, batch_size=64)
    coefficients = solver_coefficients(SolverSpec(), NUM_STEPS, schedule_of(checkpoint.info))
    requests = [SampleRequest(seed, index, coefficients, 2.0, tag=index) for index, seed in enumerate(seeds)]
    size = checkpoint.info.resolution
    images = np.zeros((len(seeds), size, size, 3), np.uint8)
    for batch in generate(engine, load_checkpoint_autoencoder(source, "cpu"), requests):
        for result, image in zip(batch.results, batch.images, strict=True):
            images[result.request.tag] = image.permute(1, 2, 0).numpy()
    return images


def trained_rows(checkpoint: str, reference: str, num_images: int, is_quiet: bool) -> list[Row]:
    """The verdict of each variant of a trained checkpoint."""
    settings = {"num_steps": NUM_STEPS}
    leading = {"name": "ddim", "timestep_spacing": "leading", "steps_offset": 0}
    variants = {
        "bf16": Side(checkpoint, {**settings, "dtype": "bf16"}),
        "weights of 8 bits": Side("python:drift:quantised", {"folder": checkpoint, "bits": 8}),
        "weights of 4 bits": Side("python:drift:quantised", {"folder": checkpoint, "bits": 4}),
        "leading timesteps": Side(checkpoint, {**settings, "solver": leading}),
    }
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(num_images)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name, variant in variants.items():
            compared = compare_sides(
                Side(checkpoint, settings),
                variant,
                out=out / name,
                prompts=prompts,
                reference=reference,
                image_metrics=["psnr", "ssim"],
                tolerance=TOLERANCE,
            ).drift
            (score,) = compared.scores
            row = {
                "what": name,
                "value": score.difference.value / score.base.value,
                "unit": "fraction of the base's squared MMD",
                "low": score.difference.low / score.base.value,
                "high": score.difference.high / score.base.value,
                "verdict": compared.verdict,
                "images": compared.images.verdict,
                "psnr": compared.images.similarity["psnr"].value,
            }
            rows.append(row)
            if not is_quiet:
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argument_parser(__doc__, quick="60 simulated pairs and 64 images")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a trained checkpoint")
    parser.add_argument("--reference", default=None, help="real images; without them only the simulation runs")
    parser.add_argument("--images", type=int, default=500, help="images of the trained checkpoint")
    parser.add_argument("--pairs", type=int, default=400, help="simulated pairs for each planted loss")
    arguments = parser.parse_args()
    num_pairs, num_images = (60, 64) if arguments.quick else (arguments.pairs, arguments.images)
    rows = simulated_rows(num_pairs)
    if not arguments.json:
        print("\n".join(json.dumps(row) for row in rows), flush=True)
    by_name = {row["what"]: row["value"] for row in rows}
    targets = [
        {"what": what, "value": by_name[what], "target": f"<= {MAX_FALSE:g}", "met": by_name[what] <= MAX_FALSE}
        for what in ("true loss 0: worse", "true loss 0.05: worse", "true loss 0.05: not worse", "true loss 0.2: not worse")
    ]
    trained: list[Row] = []
    if arguments.reference is not None:
        trained = trained_rows(str(arguments.checkpoint), arguments.reference, num_images, arguments.json)
    expected = {"bf16": "not worse", "leading timesteps": "worse", "weights of 4 bits": "worse"}
    targets += [
        {
            "what": row["what"],
            "value": row["verdict"],
            "target": expected[row["what"]],
            "met": row["verdict"] == expected[row["what"]],
        }
        for row in trained
        if row["what"] in expected
    ]
    print_results("drift", [*rows, *trained], targets, num_pairs=num_pairs, num_images=num_images)


if __name__ == "__main__":
    main()
