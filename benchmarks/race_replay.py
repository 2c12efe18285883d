"""How often a race finds the best guidance, and with how many images: races replayed on the features of real images.

    python benchmarks/race_replay.py [--quick] [--json] [--out DIR] [--replays 200]

A dense grid is sampled once (fashion, two sizes, 2 steps, 24 values of guidance, 5,000 images each; an hour of one core, and
the same command goes on where it was stopped; from shared data). Each replay shuffles the images and races on them; the truth
is the score of all 5,000. A race's images are those of its search and the re-scoring of its winner with as many fresh ones
as a grid point has, set against eight grid points. `--quick` samples the embedded scenes in a minute instead. The last line
is JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from results import print_results, row

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.evaluation.bootstrap import resamples
from isocost.evaluation.confidence_intervals import KernelReference, generated_counts
from isocost.evaluation.feature_store import SampleFeatures, read_measured
from isocost.metrics.mmd import POLYNOMIAL
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.guidance_search import Found, Race, ScoreRequest, SearchConfig, race, value_at
from isocost.sweep.guidance_search_runner import rungs_for

PLACES = range(1, 25)
METRIC = "mmd_efficientnet"
GRID_VALUES = 8
WITHIN = 0.02
PAPERS_RANGE = (1.5, 8.0)
FASHION: dict[str, Any] = {
    "family.widths": [8, 16],
    "train.num_images": 64000,
    "train.marks": [],
    "autoencoder.num_images": 30000,
    "sweep.num_steps": [2],
    "sweep.guidance": [value_at(place) for place in PLACES],
    "protocol.num_images": 5000,
    "protocol.kept": "fp16",
    "protocol.distances": ["mmd", "frechet"],
    "superres": None,
    "distill": None,
}
QUICK: dict[str, Any] = {
    "name": "quick",
    "data": {
        "resolution": 32,
        "train": {"kind": "scenes", "num_images": 512, "seed": 0},
        "reference": {"kind": "scenes", "num_images": 400, "seed": 1},
    },
    "autoencoder": {"kind": "pca", "patch": 4, "num_channels": 4, "num_fit_images": 256},
    "text_encoder": {"path": "minilm", "max_tokens": 8},
    "family": {"widths": [8]},
    "train": {"num_images": 4096, "batch_size": 32, "lr": 2e-3, "prediction_type": "v_prediction"},
    "sweep": {"num_steps": [2], "guidance": [value_at(place) for place in PLACES]},
    "protocol": {"num_images": 320, "num_reference": 400},
}


@dataclass
class SearchCell:
    """The dense grid of one size and number of steps, and what is needed to score any images of it.

    Shapes: P places, N images, R resamples. `to_reference` [P, N, 1 + R] is an image's mean kernel to each resampled
    reference, `among` [P, N, N] the kernel between images.
    """

    title: str
    places: list[int]
    to_reference: np.ndarray
    among: np.ndarray
    reference: KernelReference

    @classmethod
    def of(cls, title: str, grid: dict[int, SampleFeatures], reference: KernelReference) -> SearchCell:
        """Kernels of all images, once."""
        towards, among = [], []
        for place in sorted(grid):
            features = grid[place].features["efficientnet-lite0"].astype(np.float64)
            kernel = POLYNOMIAL.between(features, reference.features)
            towards.append(kernel @ reference.counts.T / len(reference.features))
            among.append(POLYNOMIAL.between(features, features).astype(np.float32))
        return cls(title, sorted(grid), np.stack(towards), np.stack(among), reference)

    @property
    def num_images(self) -> int:
        """N."""
        return self.to_reference.shape[1]

    def scores(self, place: int, images: np.ndarray) -> np.ndarray:
        """[1 + R] of some images, as `isocost.score.resamples` gives it."""
        at = self.places.index(place)
        counts = generated_counts(len(images), len(self.reference.within) - 1, self.reference.seed)
        among = self.among[at][np.ix_(images, images)].astype(np.float64)
        squares = np.square(counts)
        inside = np.einsum("rn,rn->r", counts @ among, counts) - squares @ np.diag(among)
        within = inside / (counts.sum(1) ** 2 - squares.sum(1)) + self.reference.within
        across = np.einsum("rn,nr->r", counts, self.to_reference[at][images]) / counts.sum(1)
        return self.reference.kernel.factor * (within - 2 * across)

    def truth(self) -> np.ndarray:
        """Scores of all images, [P]."""
        one = np.ones((1, self.num_images))
        found = []
        for at in range(len(self.places)):
            among = self.among[at].astype(np.float64)
            n = self.num_images
            within = (among.sum() - np.trace(among)) / (n * n - n) + self.reference.within[0]
            found.append(self.reference.kernel.factor * (within - 2 * float((one @ self.to_reference[at])[0, 0]) / n))
        return np.array(found)


def sampled(study: StudySpec, out: Path) -> list[SearchCell]:
    """The dense grids of a study, sampled where they are not there yet."""
    pipeline = Pipeline(study, out)
    pipeline.run()
    reference = pipeline.assets.reference
    cells = []
    for run in pipeline.runs:
        by_steps: dict[int, dict[int, SampleFeatures]] = {}
        for point in pipeline.points(run):
            place = next(each for each in PLACES if value_at(each) == point.spec.guidance)
            measured = read_measured(pipeline.store.folder("point", point.digest), tuple(reference.extractors))
            by_steps.setdefault(point.spec.num_steps, {})[place] = measured
        for num_steps, grid in by_steps.items():
            cell = SearchCell.of(f"{pipeline.cost(run).size}, {num_steps} steps", grid, reference.kernel("efficientnet-lite0"))
            some = max(grid)
            ours, theirs = cell.scores(some, np.arange(64)), resamples(grid[some], 64, METRIC, reference)
            assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4), "the replay scores as the race does"
            cells.append(cell)
    return cells


def replay(cell: SearchCell, rules: SearchConfig, seed: int) -> Found:
    """One race on shuffled images."""
    shuffled = np.random.default_rng(seed).permutation(cell.num_images)
    by_guidance = {value_at(place): place for place in cell.places}

    def score(wish: ScoreRequest) -> np.ndarray:
        return cell.scores(by_guidance[wish.guidance], shuffled[: wish.num_images])

    running: Race = race(rules)
    wishes = next(running)
    while True:
        try:
            wishes = running.send({wish: score(wish) for wish in wishes})
        except StopIteration as ended:
            return ended.value


def measure(cells: list[SearchCell], num_replays: int, told: Any) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    rows, good, spent, covered = [], [], [], []
    for cell in cells:
        truth, number = cell.truth(), cell.num_images
        first = cell.places[0]
        rules = SearchConfig(rungs_for(number), *PAPERS_RANGE, lowest_place=first, beyond=0)
        best = int(truth.argmin())
        near = [abs(truth[best] - truth[at]) for at in (best - 1, best + 1) if 0 <= at < len(truth)]
        allowed = max(WITHIN * truth[best], max(near) / 2)
        found = pd.DataFrame([vars(replay(cell, rules, seed)) for seed in range(num_replays)])
        true = found["guidance"].map(dict(zip(map(value_at, cell.places), truth, strict=True)))
        true_best = value_at(cell.places[best])
        of_grid = GRID_VALUES * number
        good.append(float((true - truth[best] <= allowed).mean()))
        spent.append(float(((found["num_images"] + number) / of_grid).mean()))
        covered.append(float(((found["low"] <= true_best) & (true_best <= found["high"])).mean()))
        lost = (true / truth[best] - 1).to_numpy()
        told(
            f"{cell.title}: best {true_best:g} ({truth[best]:.3f}); chosen {found['guidance'].value_counts().to_dict()}; "
            f"lost {100 * lost.mean():.2f} %, at most {100 * lost.max():.2f} %; good {good[-1]:.3f}; "
            f"covered {covered[-1]:.3f}; search {found['num_images'].mean():.0f}, in all {spent[-1]:.3f} of the grid; "
            f"decided {found['is_decided'].mean():.2f}"
        )
        rows += [
            row(f"{cell.title}: lost against the true best", list(lost), "share"),
            row(f"{cell.title}: images of the search", list(found["num_images"]), "images"),
            row(f"{cell.title}: images, of an 8-value grid's", list((found["num_images"] + number) / of_grid), "share"),
            row(f"{cell.title}: interval covers the true best", [covered[-1]], "share"),
        ]
    targets = [
        {"what": "choice within 2 % of the true best", "value": min(good), "target": ">= 0.95", "met": min(good) >= 0.95},
        {"what": "images of an 8-value grid's", "value": max(spent), "target": "<= 0.2", "met": max(spent) <= 0.2},
    ]
    return rows, targets


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="embedded scenes, one size, 320 images, 20 replays")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--out", type=Path, default=None, help="where the grid is kept; runs/race-replay where absent")
    options.add_argument("--replays", type=int, default=200)
    asked = options.parse_args()

    def told(line: str) -> None:
        if not asked.json:
            print(line, flush=True)

    fashion = Path(__file__).resolve().parents[1] / "studies" / "fashion.yaml"
    study = parse_spec(StudySpec, QUICK, "quick") if asked.quick else load_study(fashion, FASHION)
    out = asked.out or Path("runs") / ("race-replay-quick" if asked.quick else "race-replay")
    rows, targets = measure(sampled(study, out), 20 if asked.quick else asked.replays, told)
    print_results("race_replay", rows, targets)


if __name__ == "__main__":
    main()
