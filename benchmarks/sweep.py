"""A small guidance sweep in three ways: a loop over diffusers' pipeline, isocost's grid, and isocost's race.

    python benchmarks/sweep.py [--quick] [--json] [--out DIR]

A size is trained on the synthetic scenes (minutes, stored in DIR). Then 8 guidance values at 4 steps are sampled and scored
with the same number of images: (a) diffusers' pipeline with batch 16, PNG files, and torch-fidelity's KID on the same
features with cached features of the real images; (b) `search: grid`; (c) `search: race`. The ways run in turns. Their best
guidance is compared for every size and number of steps. The last line is JSON.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from diffusers import StableDiffusionPipeline
from PIL import Image
from results import argument_parser, at_least, print_results, row
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.models.export_diffusers import export
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.guidance_search import grid_value, nearest_grid_index

METRIC = "mmd_efficientnet"
BATCH = 16
GUIDANCE = [grid_value(index) for index in (2, 5, 8, 11, 14, 17, 20, 23)]
STUDY: dict[str, Any] = {
    "name": "small",
    "data": {
        "resolution": 32,
        "train": {"kind": "scenes", "num_images": 8192, "seed": 0},
        "reference": {"kind": "scenes", "num_images": 2048, "seed": 1},
    },
    "autoencoder": {"kind": "pretrained", "path": "scenes"},
    "text_encoder": {"path": "minilm", "max_tokens": 16},
    "family": {"widths": [8]},
    "train": {
        **{"num_images": 32768, "batch_size": 64, "lr": 2e-3, "warmup_images": 2048, "adam_betas": [0.9, 0.99]},
        **{"prediction_type": "v_prediction", "ema_half_life_images": 4096},
    },
    "sweep": {"num_steps": [4], "guidance": GUIDANCE},
    "protocol": {"num_images": 2048, "num_reference": 2048},
}
QUICK: dict[str, Any] = {
    "data.train": {"kind": "scenes", "num_images": 1024, "seed": 0},
    "data.reference": {"kind": "scenes", "num_images": 256, "seed": 1},
    "train.num_images": 1024,
    "protocol.num_images": 64,
    "protocol.num_reference": 256,
    "sweep.num_steps": [2],
    "sweep.guidance": GUIDANCE[1::3],
}


class Features(FeatureExtractorBase):
    """The features of isocost's scores as a torch-fidelity extractor: uint8 [N, 3, H, W] to float32 [N, 1280]."""

    def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
        super().__init__(name, features_list)
        self.network = EfficientNetLite0(side=64)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network(images),)


def make_study(search: str, width: int, quick: bool) -> StudySpec:
    """The study of one size."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in STUDY.items()}
    for key, value in QUICK.items() if quick else ():
        section, _, field = key.partition(".")
        config[section][field] = value
    config["family"]["widths"] = [width]
    config["sweep"]["search"] = search
    return parse_spec(StudySpec, config, "study")


BestGuidance = dict[int, float]
"""The best guidance by number of steps."""


def diffusers_sweep(trained: Path, width: int, quick: bool, folder: Path) -> BestGuidance:
    """Sweep with diffusers' pipeline in a loop, PNG files and torch-fidelity."""
    pipeline = Pipeline(make_study("grid", width, quick), trained)
    (run,) = pipeline.runs
    study, prompts = pipeline.study, pipeline.assets.reference.prompts
    diffusers_pipeline = StableDiffusionPipeline.from_pretrained(
        export(pipeline.store.folder("checkpoint", run.final), folder / "exported"), use_safetensors=True
    )
    diffusers_pipeline.set_progress_bar_config(disable=True)
    scores: dict[tuple[int, float], float] = {}
    for num_steps in study.sweep.num_steps:
        options = {"num_inference_steps": num_steps, "height": 32, "width": 32}
        for guidance in study.sweep.guidance:
            images_folder = folder / f"{num_steps}-{guidance}"
            images_folder.mkdir()
            for start in range(0, study.protocol.num_images, BATCH):
                batch = list(prompts[start : start + BATCH])
                output = diffusers_pipeline(batch, guidance_scale=guidance, **options)
                for number, image in enumerate(output.images):
                    image.save(images_folder / f"{start + number:05d}.png")
            metrics = torch_fidelity.calculate_metrics(
                input1=str(images_folder),
                input2=str(trained / "real"),
                input2_cache_name=f"real-{study.protocol.num_images}",
                cache_root=str(trained / "cache"),
                feature_extractor="isocost-benchmark",
                kid=True,
                kid_subsets=20,
                kid_subset_size=study.protocol.num_images // 2,
                cuda=False,
                verbose=False,
            )
            scores[num_steps, guidance] = metrics["kernel_inception_distance_mean"]
    return {n: min((score, w) for (steps, w), score in scores.items() if steps == n)[1] for n in study.sweep.num_steps}


def isocost_sweep(search: str) -> Callable[[Path, int, bool, Path], BestGuidance]:
    """Sweep with isocost and a search method."""

    def sweep(trained: Path, width: int, quick: bool, folder: Path) -> BestGuidance:
        pipeline = Pipeline(make_study(search, width, quick), folder / "out")
        assert pipeline.run()
        if search == "race":
            return {row["num_steps"]: row["guidance"] for row in pipeline.results_db.races().values()}
        table = pipeline.results_db.table()
        best = table.sort_values(METRIC).drop_duplicates("num_steps")
        return dict(zip(best["num_steps"], best["guidance"], strict=True))

    return sweep


def agrees(pipeline: Pipeline, num_steps: int, race_guidance: float, grid_guidance: float) -> bool:
    """True if the race's guidance is the grid's best, or not significantly worse by the grid's images."""
    race_index = nearest_grid_index(race_guidance)
    nearest = min(pipeline.study.sweep.guidance, key=lambda value: abs(nearest_grid_index(value) - race_index))
    if nearest == grid_guidance:
        return True
    (run,) = pipeline.runs
    digests = {point.spec.guidance: point.digest for point in pipeline.points(run) if point.spec.num_steps == num_steps}
    comparer = pipeline.experiments["text2image"].comparer()
    assert comparer is not None
    difference = comparer.difference(digests[nearest], digests[grid_guidance], METRIC)
    return difference is not None and difference.low <= 0


def measure(out: Path, quick: bool, log: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    torch_fidelity.register_feature_extractor("isocost-benchmark", Features)
    ways = {"a": diffusers_sweep, "b": isocost_sweep("grid"), "c": isocost_sweep("race")}
    widths = STUDY["family"]["widths"]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    choices: dict[str, dict[tuple[int, int], float]] = {way: {} for way in ways}
    all_agree = True
    for width in widths:
        trained = Pipeline(make_study("grid", width, quick), out)
        trained.prepare()
        for run in trained.runs:
            trained.train(run)
        reference = trained.assets.reference
        _save_reference(trained, out / "real")
        # Warm-up: these are computed once and then read from the artefacts.
        _ = trained.assets.prompt_embeds, reference.kernel("efficientnet-lite0")
        for way, run_sweep in ways.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                if way != "a":
                    shutil.copytree(out / "artefacts", folder / "out" / "artefacts")
                started = time.perf_counter()
                best = run_sweep(out, width, quick, folder)
                seconds[way].append(time.perf_counter() - started)
                choices[way].update({(width, steps): guidance for steps, guidance in best.items()})
                log(f"width {width}, ({way}): {seconds[way][-1]:.1f} s, best guidance {best}")
                if way == "b":
                    grid_best = best
                    grid_folder = out / f"grid-{width}"
                    shutil.rmtree(grid_folder, ignore_errors=True)
                    shutil.copytree(folder / "out", grid_folder)
        grid = Pipeline(make_study("grid", width, quick), out / f"grid-{width}")
        for steps, race_guidance in best.items():
            all_agree = all_agree and agrees(grid, steps, race_guidance, grid_best[steps])
    titles = {"a": "(a) pipeline, PNG, torch-fidelity", "b": "(b) grid", "c": "(c) race"}
    rows = [row(titles[way], [sum(times)], "s") for way, times in seconds.items()]
    for way in ("b", "c"):
        ratios = [numerator / denominator for numerator, denominator in zip(seconds["a"], seconds[way], strict=True)]
        rows.append(row(f"time of (a) / {titles[way]}", ratios, "ratio"))
    targets = at_least(rows, {"time of (a) / (b) grid": 3, "time of (a) / (c) race": 10})
    what = "race and grid choose the same guidance"
    targets.append({"what": what, "value": all_agree, "target": "true", "met": all_agree})
    log(f"best guidance by size and number of steps: {choices}")
    return rows, targets


def _save_reference(pipeline: Pipeline, folder: Path) -> None:
    """Save the reference images as files, if they are not saved yet."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    for number, image in enumerate(pipeline.assets.images("reference").images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:05d}.png")


def main() -> None:
    parser = argument_parser(__doc__, quick="3 guidance values, 2 steps, 64 images per point; under a minute")
    parser.add_argument("--out", type=Path, default=None, help="output folder of the training; default: runs/sweep")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for all three ways: a second thread does not speed up networks of this size
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    def log(line: str) -> None:
        if not arguments.json:
            print(line, file=sys.stderr, flush=True)

    out = arguments.out or Path("runs") / ("sweep-quick" if arguments.quick else "sweep")
    rows, targets = measure(out, arguments.quick, log)
    print_results("sweep", rows, targets)


if __name__ == "__main__":
    main()
