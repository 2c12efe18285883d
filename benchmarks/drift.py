"""Effect of bf16 and of compilation on the scores: the same images of one checkpoint, computed in three ways.

    python benchmarks/drift.py [--quick] [--json] [--out FOLDER] [--images 256] [--skip-compile]

Trains a small size on the synthetic scenes (stored in FOLDER, so a second run skips it), samples the same images with fp32
eager, bf16 eager and fp32 compiled, and measures the differences of images, squared MMD and Frechet distance, with paired
intervals. The target is met if the interval of the difference of squared MMDs contains 0. The last line is JSON.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import argument_parser, print_results
from torch import Tensor

from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.diffusion.solvers import solver_coefficients
from isocost.evaluation.confidence_intervals import KernelReference, paired_frechet_difference, paired_kernel_difference
from isocost.evaluation.evaluator import FeatureCollector
from isocost.models.autoencoder import Autoencoder
from isocost.models.checkpoint import Checkpoint, load_checkpoint
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.generate import generate, make_engine, schedule_of
from isocost.sampling.request import SampleRequest

STUDY = {
    "name": "drift",
    "data": {
        "resolution": 32,
        "train": {"kind": "scenes", "num_images": 2000, "seed": 0},
        "reference": {"kind": "scenes", "num_images": 1000, "seed": 1},
    },
    "autoencoder": {"kind": "pretrained", "path": "scenes"},
    "text_encoder": {"path": "minilm", "max_tokens": 32},
    "family": {"widths": [8]},
    "train": {"num_images": 6400, "batch_size": 64, "lr": 2e-3, "warmup_images": 1000, "ema_half_life_images": 1000},
    "sweep": {"num_steps": [8], "guidance": [2]},
    "protocol": {"num_images": 256, "num_reference": 1000},
}
QUICK_TRAINING_IMAGES, QUICK_IMAGES = 640, 64
BASELINE = "fp32 eager"
NUMERICS: dict[str, dict[str, Any]] = {
    "fp32 eager": {},
    "bf16 eager": {"dtype": "bf16"},
    "fp32 compiled": {"compiled": True},
}


def sample_images(
    checkpoint: Checkpoint, autoencoder: Autoencoder, pipeline: Pipeline, num_images: int, **options: Any
) -> Tensor:
    """Sample images with 8 steps of DDIM and guidance 2, uint8 [N, 3, R, R]."""
    network = copy.deepcopy(checkpoint.network)
    engine = make_engine(network, checkpoint.info, pipeline.assets.prompt_embeds, batch_size=64, **options)
    table = solver_coefficients(SolverSpec(), 8, schedule_of(checkpoint.info))
    requests = [SampleRequest(i, i, table, 2.0) for i in range(num_images)]
    resolution = checkpoint.info.resolution
    images = torch.empty(num_images, 3, resolution, resolution, dtype=torch.uint8)
    for batch in generate(engine, autoencoder, requests):
        assert not batch.nonfinite
        images[[result.request.sample_index for result in batch.results]] = batch.images
    return images


def main() -> None:
    quick = f"{QUICK_IMAGES} images after {QUICK_TRAINING_IMAGES} training images, without compilation; under a minute"
    parser = argument_parser(__doc__, quick=quick)
    parser.add_argument("--out", type=Path, default=None, help="folder of the trained network; a temporary one if absent")
    parser.add_argument("--images", type=int, default=256, help="images to sample")
    parser.add_argument("--skip-compile", action="store_true", help="skip the compiled network, which takes minutes")
    arguments = parser.parse_args()
    study = {**STUDY, "train": {**STUDY["train"], "num_images": QUICK_TRAINING_IMAGES}} if arguments.quick else STUDY
    num_images = QUICK_IMAGES if arguments.quick else arguments.images
    pipeline = Pipeline(parse_spec(StudySpec, study, "drift"), arguments.out or tempfile.mkdtemp())
    (run,) = pipeline.runs
    pipeline.train(run)
    checkpoint = load_checkpoint(pipeline.store.folder("checkpoint", run.final))
    reference = pipeline.assets.reference
    (extractor,) = reference.extractors
    real = reference.features[extractor]
    kernel = KernelReference.of(real, num_bootstrap=200)
    rows, targets = [], []
    baseline: dict[str, Any] = {}
    for name, options in NUMERICS.items():
        if (arguments.skip_compile or arguments.quick) and options.get("compiled"):
            continue
        started = time.perf_counter()
        images = sample_images(checkpoint, pipeline.assets.load_or_train_autoencoder(), pipeline, num_images, **options)
        seconds = time.perf_counter() - started
        collector = FeatureCollector(reference)
        collector.add(list(range(len(images))), images)
        features = collector.features().features[extractor]
        if not baseline:
            baseline = {"images": images, "features": features}
        pixel_differences = (images.int() - baseline["images"].int()).abs()
        difference = paired_kernel_difference(features, baseline["features"], kernel)
        frechet_difference = paired_frechet_difference(features, baseline["features"], real)
        rows.append(
            {
                "what": name,
                "value": difference.value,
                "unit": f"squared MMD minus that of {BASELINE}",
                "low": difference.low,
                "high": difference.high,
                "frechet": [frechet_difference.value, frechet_difference.low, frechet_difference.high],
                "grey_levels_mean": float(pixel_differences.double().mean()),
                "grey_levels_max": int(pixel_differences.max()),
                "seconds": seconds,
            }
        )
        if name != BASELINE:
            contains_zero = difference.low <= 0 <= difference.high
            what = f"paired interval of {name}"
            targets.append({"what": what, "value": difference.value, "target": "contains 0", "met": contains_zero})
        if not arguments.json:
            print(json.dumps(rows[-1]), flush=True)
    print_results("drift", rows, targets)


if __name__ == "__main__":
    main()
