"""Races over guides, guidance and intervals, replayed on saved features: how often they find the best, and at which cost.

    python benchmarks/guide_race_replay.py [--quick] [--json] [--out DIR] [--replays 200]

A grid over guides x guidance x intervals is sampled once with the networks of a small study (product photographs, a width of 8
guided by itself with the empty prompt, by its own early snapshot and by two checkpoints of width 4; 4 steps; 720 points with
400 images each; about 40 minutes on one core, resumed by the same command). Each replay shuffles the images and runs all races
of the study on them: guidance of the network itself, guides against each other, and the interval of both. The answer is the
best of their winners, scored with all images. The truth is the score of all images of every point. The images of a replay are
those of its races and of the scoring of the winners. `--quick` uses the synthetic scenes instead. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from race_replay import QUICK, DenseGrid
from results import argument_parser, print_results, row

from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.evaluation.feature_store import read_sample_features
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.grid import GuidanceOption, SearchCell, distinct_intervals
from isocost.sweep.guidance_search import SearchResult, grid_value
from isocost.sweep.guidance_search_runner import make_search, search_config

GRID_INDICES = range(1, 19)
SEARCHED = (1.0, grid_value(10))
"""The range of the races; they may leave it by eight grid steps, to the end of the sampled grid."""
NUM_STEPS, QUICK_NUM_STEPS = 4, 2
GUIDES: list[Any] = ["none", {"size": "all", "snapshot": "all"}]
FASHION: dict[str, Any] = {
    "family.widths": [4, 8],
    "train.num_images": 64000,
    "train.snapshots": [16000],
    "seed_replicates": None,
    "protocol.num_images": 400,
    "protocol.alignment": "none",
    "protocol.feature_dtype": "fp16",
    "superres": None,
    "distill": None,
}


def sweeps(num_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sweep of the grid and the sweep of the races."""
    intervals = distinct_intervals(SolverSpec(), num_steps, NoiseSchedule.scaled_linear())
    grid = {
        "solvers": [{"name": "ddim"}],
        "num_steps": [num_steps],
        "guidance": [grid_value(index) for index in GRID_INDICES],
        "guides": GUIDES,
        "guidance_intervals": ["all", *map(list, intervals)],
        "batch_size": 256,
        "snapshot_num_steps": 1,
    }
    return grid, {**grid, "search": "race", "guidance": list(SEARCHED), "guidance_intervals": ["all", "search"]}


def studies(is_quick: bool) -> tuple[StudySpec, StudySpec]:
    """The study that samples the grid and the study that races."""
    if is_quick:
        train = {**QUICK["train"], "snapshots": [512]}
        base = {**QUICK, "family": {"widths": [4, 8]}, "train": train, "protocol": {"num_images": 64, "num_reference": 200}}
        grid, race = (parse_spec(StudySpec, {**base, "sweep": sweep}, "quick") for sweep in sweeps(QUICK_NUM_STEPS))
        return grid, race
    reference = Path(__file__).resolve().parents[1] / "studies" / "reference.yaml"
    grid, race = (load_study(reference, {**FASHION, "sweep": sweep}) for sweep in sweeps(NUM_STEPS))
    return grid, race


class SampledGrid:
    """The sampled grid of the larger network.

    Attributes:
        grids: for every guide and interval, the points over guidance.
        true_scores: for every guide and interval, the score by guidance.
        num_images: images of a point.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        pipeline.run()
        reference = pipeline.assets.reference
        index_by_guidance = {grid_value(index): index for index in GRID_INDICES}
        (run,) = (run for run in pipeline.runs if run.model.width == 8)
        features: dict[GuidanceOption, dict[int, Any]] = {}
        for point in pipeline.points(run):
            if point.spec.guidance not in index_by_guidance or point.spec.checkpoint != run.final:
                continue
            if point.spec.num_steps not in pipeline.study.sweep.num_steps:
                continue  # the point of the snapshots
            option = GuidanceOption(point.spec.guide, point.spec.guidance_interval)
            stored = read_sample_features(pipeline.store.folder("point", point.digest), tuple(reference.extractors))
            features.setdefault(option, {})[index_by_guidance[point.spec.guidance]] = stored
        kernel = reference.kernel("efficientnet-lite0")
        self.grids = {option: DenseGrid.from_features("", by_index, kernel) for option, by_index in features.items()}
        self.true_scores = {
            option: dict(zip(map(grid_value, grid.grid_indices), grid.true_scores(), strict=True))
            for option, grid in self.grids.items()
        }
        self.num_images = next(iter(self.grids.values())).num_images

    @property
    def num_points(self) -> int:
        return sum(len(scores) for scores in self.true_scores.values())

    def race(self, cell: SearchCell, recorded: dict[str, Any], shuffled: np.ndarray) -> SearchResult:
        """Run the race of a cell on shuffled images."""
        search = make_search(cell, None, recorded)
        index_by_guidance = {grid_value(index): index for index in GRID_INDICES}
        requests = next(search)
        while True:
            scores = {}
            for request in requests:
                grid = self.grids[cell.options[request.option]]
                scores[request] = grid.scores(index_by_guidance[request.guidance], shuffled[: request.num_images])
            try:
                requests = search.send(scores)
            except StopIteration as ended:
                return ended.value


def replay(grid: SampledGrid, cells: list[SearchCell], seed: int) -> dict[str, Any]:
    """Run all races of the larger network on shuffled images, and score their winners with all images.

    Returns:
        The best of the winners, its true score and the number of images of the races.
    """
    shuffled = np.random.default_rng(seed).permutation(grid.num_images)
    recorded: dict[str, Any] = {}
    winners = []
    num_images = 0
    for cell in sorted(cells, key=lambda cell: cell.base is not None):
        result = grid.race(cell, recorded, shuffled)
        recorded[cell.digest] = {"option_index": result.option, "guidance": result.guidance}
        option = cell.options[result.option]
        winners.append({"option": option, "guidance": result.guidance})
        num_images += result.num_images
    best = min(winners, key=lambda winner: grid.true_scores[winner["option"]][winner["guidance"]])
    return {
        "option": best["option"],
        "guidance": best["guidance"],
        "true_score": grid.true_scores[best["option"]][best["guidance"]],
        "search_images": num_images,
        "num_winners": len(winners),
    }


def measure(
    grid: SampledGrid, cells: list[SearchCell], num_replays: int, log: Callable[[str], None]
) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    best_option, best_guidance = min(
        ((option, guidance) for option, scores in grid.true_scores.items() for guidance in scores),
        key=lambda at: grid.true_scores[at[0]][at[1]],
    )
    best = grid.true_scores[best_option][best_guidance]
    by_option = {option: min(scores.values()) for option, scores in grid.true_scores.items()}
    for option, score in sorted(by_option.items(), key=lambda item: item[1]):
        log(f"{score:.4f} true best of{option if str(option) else ', network itself'}")
    results = pd.DataFrame([replay(grid, cells, seed) for seed in range(num_replays)])
    tolerance = search_config(cells[-1]).tolerance
    regrets = (results["true_score"] / best - 1).to_numpy()
    images = results["search_images"] + results["num_winners"] * grid.num_images
    fractions = (images / (grid.num_points * grid.num_images)).to_numpy()
    success = float((regrets <= tolerance).mean())
    log(
        f"{grid.num_points} points of {grid.num_images} images; best{best_option}, guidance {best_guidance:g}: {best:.4f}; "
        f"tolerance {100 * tolerance:.1f} %; within it {success:.3f}; regret mean {100 * regrets.mean():.2f} %, "
        f"maximum {100 * regrets.max():.2f} %; images {images.mean():.0f}, {fractions.mean():.4f} of the grid"
    )
    log(json.dumps(results["option"].map(str).value_counts().to_dict()))
    rows = [
        row("regret against the true best", list(regrets), "fraction"),
        row("images / images of the grid", list(fractions), "ratio"),
    ]
    targets = [
        {"what": "choice within the tolerance", "value": success, "target": ">= 0.95", "met": success >= 0.95},
        {
            "what": "images / images of the grid",
            "value": float(fractions.max()),
            "target": "<= 0.1",
            "met": bool(fractions.max() <= 0.1),
        },
    ]
    return rows, targets


def main() -> None:
    parser = argument_parser(__doc__, quick="synthetic scenes, 64 images, 20 replays; minutes")
    parser.add_argument("--out", type=Path, default=None, help="output folder of the grid; default: runs/guide-race-replay")
    parser.add_argument("--replays", type=int, default=200, help="number of replays")
    arguments = parser.parse_args()

    def log(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    out = arguments.out or Path("runs") / ("guide-race-replay-quick" if arguments.quick else "guide-race-replay")
    grid_study, race_study = studies(arguments.quick)
    grid = SampledGrid(Pipeline(grid_study, out))
    racing = Pipeline(race_study, out)
    (run,) = (run for run in racing.runs if run.model.width == 8)
    jobs = racing.experiments["text2image"].jobs(run)
    cells = [cell for job in jobs for cell in job.cells if len(cell.guidance) > 1]
    rows, targets = measure(grid, cells, 20 if arguments.quick else arguments.replays, log)
    print_results("guide_race_replay", rows, targets)


if __name__ == "__main__":
    main()
