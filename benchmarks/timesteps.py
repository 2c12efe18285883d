"""Do timesteps that follow a checkpoint's own trajectories pay? Against the spacings that everyone uses, by paired differences.

    python benchmarks/timesteps.py --reference IMAGES [--quick] [--json] [--checkpoint FOLDER] [--images 1000] [--guidance 2]

Every way of spacing samples the same prompts and noise with DDIM and DPM-Solver++ (2M) at 2 to 8 steps. The score is the
squared MMD on EfficientNet-lite0 features. `optimized` is `isocost optimize-timesteps` (arXiv 2405.11326), found with the same
guidance and other noise; `gits` is the same with errors in the paper's coordinates. `ays` is the list of Align Your Steps for
Stable Diffusion 1.5 (arXiv 2404.14507), interpolated in log sigma. A row has the score, and the paired difference from
`trailing`. The last line is JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from drift import CHECKPOINT, METRIC, PROMPTS
from results import Row, argument_parser, print_results

from isocost.config.evaluation import ProtocolSpec
from isocost.config.sampling import SolverSpec
from isocost.evaluation.evaluator import Scorer
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.image_sources import SourceImage, iter_images
from isocost.evaluation.paired import resampled_difference
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.evaluation.reference_stats import extract_features
from isocost.metrics.arrays import Array
from isocost.sampling.generate import schedule_of
from isocost.sampling.sample import Model
from isocost.sampling.trajectories import optimize_timesteps

STEPS, QUICK_STEPS = (2, 3, 4, 6, 8), (2, 4)
SOLVERS = ("ddim", "dpmsolver++2m")
SPACINGS = ("trailing", "linspace", "karras", "exponential", "beta")
AYS_SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def ays_timesteps(model: Model, num_steps: int) -> tuple[int, ...]:
    """The timesteps nearest to the list of Align Your Steps, interpolated in log sigma to `num_steps` steps."""
    schedule = schedule_of(model.info)
    positions = np.linspace(0, len(AYS_SIGMAS) - 1, num_steps + 1)
    log_sigma = np.interp(positions, np.arange(len(AYS_SIGMAS)), np.log(AYS_SIGMAS))[:-1]
    known = np.log(np.minimum(schedule.sigma / np.maximum(schedule.alpha, 1e-9), 1e9))
    return tuple(int(np.abs(known - value).argmin()) for value in log_sigma)


def main() -> None:
    parser = argument_parser(__doc__, quick="2 and 4 steps, 64 images")
    parser.add_argument("--reference", required=True, help="folder of real images")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="a trained checkpoint")
    parser.add_argument("--images", type=int, default=1000, help="images of every configuration")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale")
    arguments = parser.parse_args()
    num_images = 64 if arguments.quick else arguments.images
    steps = QUICK_STEPS if arguments.quick else STEPS
    model = Model(arguments.checkpoint)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(num_images)]
    spec = ProtocolSpec(num_images=num_images, num_bootstrap=1000)
    extractors = make_extractors(spec, torch.device("cpu"))
    real = extract_features(iter_images(arguments.reference, resolution=None, exact=False), extractors)
    protocol = make_protocol(spec, resolution=0, extractor="", reference=real.content, num_reference=len(real), prompts=prompts)
    reference = ReferenceSet(protocol, extractors, real.features, [])
    optimized, gits = (
        optimize_timesteps(model, PROMPTS, steps, guidance=arguments.guidance, is_scaled=is_scaled)
        for is_scaled in (False, True)
    )
    rows: list[Row] = []
    for name in SOLVERS:
        for num_steps in steps:
            solvers = {spacing: SolverSpec(name=name, timestep_spacing=spacing) for spacing in SPACINGS}  # type: ignore[arg-type]
            solvers |= {
                "ays": SolverSpec(name=name, timesteps=ays_timesteps(model, num_steps)),
                "optimized": SolverSpec(name=name, timesteps=optimized[num_steps]),
                "gits": SolverSpec(name=name, timesteps=gits[num_steps]),
            }
            scores: dict[str, Array] = {}
            for way, solver in solvers.items():
                samples = model.sample(prompts, solver=solver, num_steps=num_steps, guidance=arguments.guidance)
                images = torch.from_numpy(samples.array[:, 0]).permute(0, 3, 1, 2)
                source = (SourceImage(str(index), str(index), image) for index, image in enumerate(images))
                features = SampleFeatures(extract_features(source, extractors).features)
                scores[way] = Scorer(features, reference, spec.metrics).resamples()[METRIC]
                difference = resampled_difference(scores[way], scores["trailing"])
                row = {
                    "what": f"{name}, {num_steps} steps, {way}",
                    "value": float(scores[way][0]),
                    "unit": "squared MMD",
                    "minus_trailing": [difference.value, difference.low, difference.high],
                    "timesteps": solver.timesteps,
                }
                rows.append(row)
                if not arguments.json:
                    print(json.dumps(row), flush=True)
    print_results("timesteps", rows, [], num_images=num_images, guidance=arguments.guidance)


if __name__ == "__main__":
    main()
