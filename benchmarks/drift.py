"""Do bf16 and compilation move the scores? One trained checkpoint, the same images in three ways of computing.

    python benchmarks/drift.py [--json] [--out FOLDER] [--images 256] [--skip-compile]

Trains a small size on the embedded scenes (kept in FOLDER, so a second run goes straight on), draws the same images in fp32
eager, bf16 eager and fp32 compiled, and states how far images, kernel and Frechet distance move, with the paired interval
of each difference. Holds where the interval of the squared MMD's difference contains 0. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import print_results
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
WAYS: dict[str, dict[str, Any]] = {
    "fp32 eager": {},
    "bf16 eager": {"dtype": "bf16"},
    "fp32 compiled": {"compiled": True},
}


def drawn(checkpoint: Checkpoint, autoencoder: Autoencoder, pipeline: Pipeline, num_images: int, **options: Any) -> Tensor:
    """Images uint8 [N, 3, R, R], 8 steps of DDIM with guidance 2."""
    network = copy.deepcopy(checkpoint.network)
    engine = make_engine(network, checkpoint.info, pipeline.assets.prompt_embeds, batch_size=64, **options)
    table = solver_coefficients(SolverSpec(), 8, schedule_of(checkpoint.info))
    rows = [SampleRequest(i, i, table, 2.0) for i in range(num_images)]
    side = checkpoint.info.resolution
    images = torch.empty(num_images, 3, side, side, dtype=torch.uint8)
    for part in generate(engine, autoencoder, rows):
        assert not part.broken
        images[[row.row.sample_index for row in part.rows]] = part.images
    return images


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--out", type=Path, default=None)
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--skip-compile", action="store_true", help="leave minutes of compiling out")
    asked = options.parse_args()
    pipeline = Pipeline(parse_spec(StudySpec, STUDY, "drift"), asked.out or tempfile.mkdtemp())
    (run,) = pipeline.runs
    pipeline.train(run)
    checkpoint = load_checkpoint(pipeline.store.folder("checkpoint", run.final))
    reference = pipeline.assets.reference
    (extractor,) = reference.extractors
    real = reference.features[extractor]
    kernel = KernelReference.of(real, num_bootstrap=200)
    rows, targets = [], []
    plain: dict[str, Any] = {}
    for way, numerics in WAYS.items():
        if asked.skip_compile and numerics.get("compiled"):
            continue
        started = time.perf_counter()
        images = drawn(checkpoint, pipeline.assets.autoencoder, pipeline, asked.images, **numerics)
        seconds = time.perf_counter() - started
        measuring = FeatureCollector(reference)
        measuring.add(list(range(len(images))), images)
        features = measuring.measured().features[extractor]
        if not plain:
            plain = {"images": images, "features": features}
        apart = (images.int() - plain["images"].int()).abs()
        moved = paired_kernel_difference(features, plain["features"], kernel)
        moved_frechet = paired_frechet_difference(features, plain["features"], real)
        rows.append(
            {
                "what": way,
                "value": moved.value,
                "unit": "squared MMD less that of fp32 eager",
                "low": moved.low,
                "high": moved.high,
                "frechet": [moved_frechet.value, moved_frechet.low, moved_frechet.high],
                "grey_levels_mean": float(apart.double().mean()),
                "grey_levels_max": int(apart.max()),
                "seconds": seconds,
            }
        )
        if way != "fp32 eager":
            holds = moved.low <= 0 <= moved.high
            targets.append(
                {"what": f"{way} within the paired interval", "value": moved.value, "target": "holds 0", "met": holds}
            )
        if not asked.json:
            print(json.dumps(rows[-1]), flush=True)
    print_results("drift", rows, targets)


if __name__ == "__main__":
    main()
