"""Guidance races, replayed on saved features: how often they find the best guidance, and with how many images.

    python benchmarks/race_replay.py [--quick] [--json] [--out DIR] [--replays 200]

A dense grid is sampled once (studies/fashion.yaml with its data, two sizes, 2 steps, 24 guidance values with 5,000 images
each; one hour on one core, resumed by the same command). Each replay shuffles the images and runs a race on them; the truth
is the score of all 5,000 images. The images of a race are those of its search and of the final scoring of its winner, which
has as many new images as a grid point; they are compared with the images of eight grid points. `--quick` uses the synthetic
scenes instead. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from results import argument_parser, print_results, row

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.evaluation.bootstrap import resamples
from isocost.evaluation.confidence_intervals import KernelReference, generated_counts
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features
from isocost.metrics.mmd import POLYNOMIAL
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.guidance_search import GuidanceSearch, ScoreRequest, SearchConfig, SearchResult, grid_value, search_guidance
from isocost.sweep.guidance_search_runner import rungs_for

GRID_INDICES = range(1, 25)
METRIC = "mmd_efficientnet"
NUM_GRID_VALUES = 8
MAX_REGRET = 0.02
PAPER_RANGE = (1.5, 8.0)
FASHION: dict[str, Any] = {
    "family.widths": [8, 16],
    "train.num_images": 64000,
    "train.snapshots": [],
    "autoencoder.num_images": 30000,
    "sweep.num_steps": [2],
    "sweep.guidance": [grid_value(index) for index in GRID_INDICES],
    "protocol.num_images": 5000,
    "protocol.feature_dtype": "fp16",
    "protocol.metrics": ["mmd", "frechet"],
    "superres": None,
    "distill": None,
}
QUICK: dict[str, Any] = {
    "name": "quick",
    "data": {
        "resolution": 32,
        "train": {"kind": "scenes", "num_images": 256, "seed": 0},
        "reference": {"kind": "scenes", "num_images": 200, "seed": 1},
    },
    "autoencoder": {"kind": "pca", "patch": 4, "num_channels": 4, "num_fit_images": 256},
    "text_encoder": {"path": "minilm", "max_tokens": 8},
    "family": {"widths": [8]},
    "train": {"num_images": 1024, "batch_size": 32, "lr": 2e-3, "prediction_type": "v_prediction"},
    "sweep": {"num_steps": [2], "guidance": [grid_value(index) for index in GRID_INDICES]},
    "protocol": {"num_images": 160, "num_reference": 200},
}


@dataclass
class DenseGrid:
    """The dense grid of one size and number of steps, with kernels that allow to score any subset of its images.

    Shapes: G guidance values, N images, R resamples.

    Attributes:
        title: size and number of steps.
        grid_indices: grid indices of the guidance values, G.
        to_reference: mean kernel of each image to each resampled reference, [G, N, 1 + R].
        kernels: kernel between images, [G, N, N].
        reference: the reference.
    """

    title: str
    grid_indices: list[int]
    to_reference: np.ndarray
    kernels: np.ndarray
    reference: KernelReference

    @classmethod
    def from_features(cls, title: str, grid: dict[int, SampleFeatures], reference: KernelReference) -> DenseGrid:
        """Compute the kernels of all images."""
        to_reference, kernels = [], []
        for index in sorted(grid):
            features = grid[index].features["efficientnet-lite0"].astype(np.float64)
            kernel = POLYNOMIAL.gram(features, reference.features)
            to_reference.append(kernel @ reference.counts.T / len(reference.features))
            kernels.append(POLYNOMIAL.gram(features, features).astype(np.float32))
        return cls(title, sorted(grid), np.stack(to_reference), np.stack(kernels), reference)

    @property
    def num_images(self) -> int:
        return self.to_reference.shape[1]

    def scores(self, grid_index: int, images: np.ndarray) -> np.ndarray:
        """Scores [1 + R] of a subset of images, equal to those of `isocost.evaluation.bootstrap.resamples`."""
        position = self.grid_indices.index(grid_index)
        counts = generated_counts(len(images), len(self.reference.within) - 1, self.reference.seed)
        kernel = self.kernels[position][np.ix_(images, images)].astype(np.float64)
        squares = np.square(counts)
        pair_sums = np.einsum("rn,rn->r", counts @ kernel, counts) - squares @ np.diag(kernel)
        within = pair_sums / (counts.sum(1) ** 2 - squares.sum(1)) + self.reference.within
        across = np.einsum("rn,nr->r", counts, self.to_reference[position][images]) / counts.sum(1)
        return self.reference.kernel.factor * (within - 2 * across)

    def true_scores(self) -> np.ndarray:
        """Scores of all images, [G]."""
        ones = np.ones((1, self.num_images))
        scores = []
        for position in range(len(self.grid_indices)):
            kernel = self.kernels[position].astype(np.float64)
            n = self.num_images
            within = (kernel.sum() - np.trace(kernel)) / (n * n - n) + self.reference.within[0]
            across = float((ones @ self.to_reference[position])[0, 0]) / n
            scores.append(self.reference.kernel.factor * (within - 2 * across))
        return np.array(scores)


def sample_grids(study: StudySpec, out: Path) -> list[DenseGrid]:
    """The dense grids of a study, sampled if they do not exist in `out`."""
    pipeline = Pipeline(study, out)
    pipeline.run()
    reference = pipeline.assets.reference
    grids = []
    for run in pipeline.runs:
        by_steps: dict[int, dict[int, SampleFeatures]] = {}
        for point in pipeline.points(run):
            grid_index = next(index for index in GRID_INDICES if grid_value(index) == point.spec.guidance)
            features = read_sample_features(pipeline.store.folder("point", point.digest), tuple(reference.extractors))
            by_steps.setdefault(point.spec.num_steps, {})[grid_index] = features
        for num_steps, by_index in by_steps.items():
            title = f"{pipeline.cost(run).size}, {num_steps} steps"
            grid = DenseGrid.from_features(title, by_index, reference.kernel("efficientnet-lite0"))
            last = max(by_index)
            actual, expected = grid.scores(last, np.arange(64)), resamples(by_index[last], 64, METRIC, reference)
            assert np.allclose(actual, expected, rtol=1e-4, atol=1e-4), "replays and races must give equal scores"
            grids.append(grid)
    return grids


def replay(grid: DenseGrid, config: SearchConfig, seed: int) -> SearchResult:
    """Run one race on shuffled images."""
    shuffled = np.random.default_rng(seed).permutation(grid.num_images)
    index_by_guidance = {grid_value(index): index for index in grid.grid_indices}

    def score(request: ScoreRequest) -> np.ndarray:
        return grid.scores(index_by_guidance[request.guidance], shuffled[: request.num_images])

    search: GuidanceSearch = search_guidance(config)
    requests = next(search)
    while True:
        try:
            requests = search.send({request: score(request) for request in requests})
        except StopIteration as stopped:
            return stopped.value


def measure(grids: list[DenseGrid], num_replays: int, log: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    rows, success_rates, image_fractions = [], [], []
    for grid in grids:
        true_scores, num_images = grid.true_scores(), grid.num_images
        config = SearchConfig(rungs_for(num_images), *PAPER_RANGE, min_index=grid.grid_indices[0], max_extension=0)
        best = int(true_scores.argmin())
        best_score, best_guidance = true_scores[best], grid_value(grid.grid_indices[best])
        neighbours = [
            abs(best_score - true_scores[position]) for position in (best - 1, best + 1) if 0 <= position < len(true_scores)
        ]
        max_loss = max(MAX_REGRET * best_score, max(neighbours) / 2)
        results = pd.DataFrame([vars(replay(grid, config, seed)) for seed in range(num_replays)])
        chosen_scores = results["guidance"].map(dict(zip(map(grid_value, grid.grid_indices), true_scores, strict=True)))
        fractions = (results["num_images"] + num_images) / (NUM_GRID_VALUES * num_images)
        success_rates.append(float((chosen_scores - best_score <= max_loss).mean()))
        image_fractions.append(float(fractions.mean()))
        coverage = float(((results["low"] <= best_guidance) & (best_guidance <= results["high"])).mean())
        regrets = (chosen_scores / best_score - 1).to_numpy()
        log(
            f"{grid.title}: best guidance {best_guidance:g} ({best_score:.3f}); "
            f"chosen {results['guidance'].value_counts().to_dict()}; "
            f"regret {100 * regrets.mean():.2f} %, maximum {100 * regrets.max():.2f} %; success {success_rates[-1]:.3f}; "
            f"coverage {coverage:.3f}; search {results['num_images'].mean():.0f} images, with final scoring "
            f"{image_fractions[-1]:.3f} of the grid; decided {results['is_decided'].mean():.2f}"
        )
        rows += [
            row(f"{grid.title}: regret against the true best", list(regrets), "fraction"),
            row(f"{grid.title}: images of the search", list(results["num_images"]), "images"),
            row(f"{grid.title}: images / images of an 8-value grid", list(fractions), "ratio"),
            row(f"{grid.title}: intervals that contain the true best", [coverage], "fraction"),
        ]
    success_rate, image_fraction = min(success_rates), max(image_fractions)
    what = "images / images of an 8-value grid"
    targets = [
        {"what": "choice within 2 % of the best", "value": success_rate, "target": ">= 0.95", "met": success_rate >= 0.95},
        {"what": what, "value": image_fraction, "target": "<= 0.2", "met": image_fraction <= 0.2},
    ]
    return rows, targets


def main() -> None:
    parser = argument_parser(__doc__, quick="synthetic scenes, one size, 160 images, 20 replays; under a minute")
    parser.add_argument("--out", type=Path, default=None, help="output folder of the grid; default: runs/race-replay")
    parser.add_argument("--replays", type=int, default=200, help="number of races")
    arguments = parser.parse_args()

    def log(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    fashion = Path(__file__).resolve().parents[1] / "studies" / "fashion.yaml"
    study = parse_spec(StudySpec, QUICK, "quick") if arguments.quick else load_study(fashion, FASHION)
    out = arguments.out or Path("runs") / ("race-replay-quick" if arguments.quick else "race-replay")
    rows, targets = measure(sample_grids(study, out), 20 if arguments.quick else arguments.replays, log)
    print_results("race_replay", rows, targets)


if __name__ == "__main__":
    main()
