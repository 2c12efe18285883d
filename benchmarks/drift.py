"""Do bf16 and compilation move the scores? One trained checkpoint, the same pictures in three ways of computing.

    python benchmarks/drift.py [--json] [--out FOLDER] [--pictures 256] [--skip-compile]

Trains a small size on the embedded scenes (kept in FOLDER, so a second run goes straight on), draws the same pictures in fp32
eager, bf16 eager and fp32 compiled, and states how far pictures, kernel and Frechet distance move, with the paired interval
of each difference. Holds where the interval of the kernel distance's difference contains 0. The last line is JSON.
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
from isocost.config.sampling import SamplerSpec
from isocost.config.study import StudySpec
from isocost.diffusion.solvers import build_table
from isocost.evaluation.confidence_intervals import KernelReference, paired_frechet_difference, paired_kernel_difference
from isocost.evaluation.evaluator import Measuring
from isocost.models.autoencoder import Codec
from isocost.models.checkpoint import Checkpoint, load_checkpoint
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.generate import generate, make_engine, schedule_of
from isocost.sampling.request import Row

STUDY = {
    "name": "drift",
    "data": {
        "resolution": 32,
        "train": {"kind": "scenes", "num_pictures": 2000, "seed": 0},
        "reference": {"kind": "scenes", "num_pictures": 1000, "seed": 1},
    },
    "codec": {"kind": "pretrained", "path": "scenes"},
    "text": {"path": "minilm", "max_tokens": 32},
    "family": {"widths": [8]},
    "train": {"num_images": 6400, "batch_size": 64, "lr": 2e-3, "warmup_images": 1000, "ema_half_life_images": 1000},
    "sweep": {"num_steps": [8], "guidance": [2]},
    "protocol": {"num_pictures": 256, "num_reference": 1000},
}
WAYS: dict[str, dict[str, Any]] = {
    "fp32 eager": {},
    "bf16 eager": {"precision": "bf16"},
    "fp32 compiled": {"compiled": True},
}


def drawn(checkpoint: Checkpoint, codec: Codec, pipeline: Pipeline, num_pictures: int, **options: Any) -> Tensor:
    """Pictures uint8 [N, 3, R, R], 8 steps of DDIM with guidance 2."""
    network = copy.deepcopy(checkpoint.network)
    engine = make_engine(network, checkpoint.info, pipeline.materials.caption_states, bucket_size=64, **options)
    table = build_table(SamplerSpec(), 8, schedule_of(checkpoint.info))
    rows = [Row(i, i, table, 2.0) for i in range(num_pictures)]
    side = checkpoint.info.resolution
    pictures = torch.empty(num_pictures, 3, side, side, dtype=torch.uint8)
    for part in generate(engine, codec, rows):
        assert not part.broken
        pictures[[row.row.picture_id for row in part.rows]] = part.pictures
    return pictures


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--out", type=Path, default=None)
    options.add_argument("--pictures", type=int, default=256)
    options.add_argument("--skip-compile", action="store_true", help="leave minutes of compiling out")
    asked = options.parse_args()
    pipeline = Pipeline(parse_spec(StudySpec, STUDY, "drift"), asked.out or tempfile.mkdtemp())
    (run,) = pipeline.runs
    pipeline.train(run)
    checkpoint = load_checkpoint(pipeline.store.folder("checkpoint", run.final))
    reference = pipeline.materials.reference
    (extractor,) = reference.extractors
    real = reference.features[extractor]
    kernel = KernelReference.of(real, num_bootstrap=200)
    rows, targets = [], []
    plain: dict[str, Any] = {}
    for way, numerics in WAYS.items():
        if asked.skip_compile and numerics.get("compiled"):
            continue
        started = time.perf_counter()
        pictures = drawn(checkpoint, pipeline.materials.codec, pipeline, asked.pictures, **numerics)
        seconds = time.perf_counter() - started
        measuring = Measuring(reference)
        measuring.add(list(range(len(pictures))), pictures)
        features = measuring.measured().features[extractor]
        if not plain:
            plain = {"pictures": pictures, "features": features}
        apart = (pictures.int() - plain["pictures"].int()).abs()
        moved = paired_kernel_difference(features, plain["features"], kernel)
        moved_frechet = paired_frechet_difference(features, plain["features"], real)
        rows.append(
            {
                "what": way,
                "value": moved.value,
                "unit": "kernel distance less that of fp32 eager",
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
