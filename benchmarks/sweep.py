"""A small whole study in three ways: the loop people write, the same grid here, and a race.

    python benchmarks/sweep.py [--quick] [--json] [--out DIR]

A size is trained on the embedded scenes (minutes, kept in DIR); then 8 guidance values at 4 steps are drawn and scored, as many
images each: (a) diffusers' pipeline at batch 16, PNG files, torch-fidelity's KID on the same features, real features cached;
(b) `search: grid`; (c) `search: race`. The three take turns. Their best guidance for every size and step count are set against
each other. The last line is JSON.
"""

from __future__ import annotations

import argparse
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
from results import at_least, print_results, row
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.evaluation.paired import PairedComparer
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.models.export_diffusers import export
from isocost.pipeline.pipeline import Pipeline
from isocost.sweep.guidance_search import nearest_grid_index, value_at

METRIC = "mmd_efficientnet"
BATCH = 16
GUIDANCE = [value_at(place) for place in (2, 5, 8, 11, 14, 17, 20, 23)]
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
QUICK: dict[str, Any] = {"train.num_images": 1024, "protocol.num_images": 64, "sweep.num_steps": [2]}


class Features(FeatureExtractorBase):
    """The features of our scores as torch-fidelity takes them: uint8 [N, 3, H, W] to float32 [N, 1280]."""

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


def study_of(search: str, width: int, quick: bool) -> StudySpec:
    """The study of one size."""
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in STUDY.items()}
    for key, value in QUICK.items() if quick else ():
        part, _, name = key.partition(".")
        plain[part][name] = value
    plain["family"]["widths"] = [width]
    plain["sweep"]["search"] = search
    return parse_spec(StudySpec, plain, "study")


Found = dict[int, float]
"""The best guidance by number of steps."""


def by_hand(trained: Path, width: int, quick: bool, folder: Path) -> Found:
    """diffusers' pipeline in a loop, PNG files, torch-fidelity."""
    pipeline = Pipeline(study_of("grid", width, quick), trained)
    (run,) = pipeline.runs
    study, captions = pipeline.study, pipeline.assets.reference.captions
    drawer = StableDiffusionPipeline.from_pretrained(
        export(pipeline.store.folder("checkpoint", run.final), folder / "exported"), use_safetensors=True
    )
    drawer.set_progress_bar_config(disable=True)
    scores: dict[tuple[int, float], float] = {}
    for num_steps in study.sweep.num_steps:
        for guidance in study.sweep.guidance:
            place = folder / f"{num_steps}-{guidance}"
            place.mkdir()
            for start in range(0, study.protocol.num_images, BATCH):
                some = captions[start : start + BATCH]
                drawn = drawer(some, num_inference_steps=num_steps, guidance_scale=guidance, height=32, width=32)
                for number, image in enumerate(drawn.images):
                    image.save(place / f"{start + number:05d}.png")
            found = torch_fidelity.calculate_metrics(
                input1=str(place),
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
            scores[num_steps, guidance] = found["kernel_inception_distance_mean"]
    return {n: min((score, w) for (steps, w), score in scores.items() if steps == n)[1] for n in study.sweep.num_steps}


def by_us(search: str) -> Callable[[Path, int, bool, Path], Found]:
    """The sweep of this project."""

    def sweep(trained: Path, width: int, quick: bool, folder: Path) -> Found:
        pipeline = Pipeline(study_of(search, width, quick), folder / "out")
        assert pipeline.run()
        if search == "race":
            return {row["num_steps"]: row["guidance"] for row in pipeline.results_db.races().values()}
        table = pipeline.results_db.table()
        best = table.sort_values(METRIC).drop_duplicates("num_steps")
        return dict(zip(best["num_steps"], best["guidance"], strict=True))

    return sweep


def agrees(pipeline: Pipeline, num_steps: int, raced: float, best: float) -> bool:
    """Whether the raced guidance is the grid's best, or one that the grid's images do not set apart from it."""
    near = min(GUIDANCE, key=lambda value: abs(nearest_grid_index(value) - nearest_grid_index(raced)))
    if near == best:
        return True
    (run,) = pipeline.runs
    digest = {p.spec.guidance: p.digest for p in pipeline.points(run) if p.spec.num_steps == num_steps}
    pairing = PairedComparer((pipeline.store,), pipeline.assets.reference, pipeline.study.protocol.metrics)
    apart = pairing.of_points(digest[near], digest[best], METRIC)
    return apart is not None and apart.low <= 0


def measure(out: Path, quick: bool, told: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    torch_fidelity.register_feature_extractor("isocost-benchmark", Features)
    ways = {"a": by_hand, "b": by_us("grid"), "c": by_us("race")}
    widths = STUDY["family"]["widths"]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, dict[tuple[int, int], float]] = {way: {} for way in ways}
    same = True
    for width in widths:
        trained = Pipeline(study_of("grid", width, quick), out)
        trained.prepare()
        for run in trained.runs:
            trained.train(run)
        reference = trained.assets.reference
        _save_real(trained, out / "real")
        by_hand_warm = trained.assets.prompt_embeds, reference.kernel("efficientnet-lite0")
        del by_hand_warm
        for way, do in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                if way != "a":
                    shutil.copytree(out / "artefacts", place / "out" / "artefacts")
                started = time.perf_counter()
                best = do(out, width, quick, place)
                seconds[way].append(time.perf_counter() - started)
                found[way].update({(width, steps): guidance for steps, guidance in best.items()})
                told(f"width {width}, ({way}): {seconds[way][-1]:.1f} s, best guidance {best}")
                if way == "b":
                    grid_best = best
                    kept = out / f"grid-{width}"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(place / "out", kept)
        grid = Pipeline(study_of("grid", width, quick), out / f"grid-{width}")
        for steps, raced in best.items():
            same = same and agrees(grid, steps, raced, grid_best[steps])
    titles = {"a": "(a) pipeline, PNG, torch-fidelity", "b": "(b) grid", "c": "(c) race"}
    rows = [row(titles[way], [sum(times)], "s") for way, times in seconds.items()]
    for way in ("b", "c"):
        rows.append(
            row(f"{titles[way]} over (a)", [a / own for a, own in zip(seconds["a"], seconds[way], strict=True)], "ratio")
        )
    targets = at_least(rows, {"(b) grid over (a)": 3, "(c) race over (a)": 10})
    targets.append({"what": "race and grid choose the same guidance", "value": same, "target": "true", "met": same})
    told(f"best guidance by size and steps: {found}")
    return rows, targets


def _save_real(pipeline: Pipeline, folder: Path) -> None:
    """The reference images as files, once."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    for number, image in enumerate(pipeline.assets.images("reference").images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:05d}.png")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="one size, one step count, 64 images a point")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--out", type=Path, default=None, help="where trained networks are kept; runs/sweep where absent")
    asked = options.parse_args()
    torch.set_num_threads(1)  # of all three ways: networks this small gain nothing by a second one
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    def told(line: str) -> None:
        if not asked.json:
            print(line, file=sys.stderr, flush=True)

    out = asked.out or Path("runs") / ("sweep-quick" if asked.quick else "sweep")
    rows, targets = measure(out, asked.quick, told)
    print_results("sweep", rows, targets)


if __name__ == "__main__":
    main()
