"""Few-step students where the truth is known: a mixture of Gaussians in the plane, with its analytic denoiser as the teacher.

    python benchmarks/distill.py [--quick] [--json] [--variant NAME ...] [--images N]

Three classes of three modes each, on Stable Diffusion's schedule; the class is the caption. A small network is first fitted
to the data, as a family is trained before it is distilled; then each variant's student starts from it, is trained by the
same loop and the same losses as U-Nets are (train/distill.py), and draws with its own solver at w = 1. Distances are
sliced Wasserstein distances to the truth, class by class, against those of the teacher in 50 steps of DDIM. At w = 3, where
no truth is known, students are compared with the teacher's own samples. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from results import print_results
from torch import Tensor, nn

from isocost.config.finetune import DistillSpec
from isocost.config.sampling import SolverSpec
from isocost.config.training import TrainSpec
from isocost.data.latent_cache import Cache
from isocost.diffusion.noise_schedule import NoiseSchedule, x0_coefficients
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.guidance_embedding import guidance_embedding
from isocost.training.distillation import (
    ConditionalConsistencyDistillation,
    ConsistencyDistillation,
    Distillation,
    ProgressiveDistillation,
)
from isocost.training.objectives import TextToImage
from isocost.training.trainer import train

NUM_CLASSES, NUM_MODES, SPREAD = 3, 3, 0.5
NUM_DATA, NUM_DRAWN, NUM_SLICES = 100_000, 10_000, 64
HIDDEN, EMBEDDING, GUIDANCE_WIDTH = 256, 64, 32
SOLVER_STEPS, TEACHER_STEPS = 50, 50
VARIANTS = ("consistency", "codi", "codi-efficient", "progressive")
SCHEDULE = NoiseSchedule.scaled_linear()


class Mixture:
    """Means [K, M, 2] of K classes; every mode is as likely and as wide."""

    def __init__(self) -> None:
        angles = 2 * math.pi * torch.arange(NUM_CLASSES * NUM_MODES) / (NUM_CLASSES * NUM_MODES)
        radius = torch.tensor([1.6, 1.0, 0.6]).repeat(NUM_CLASSES)
        means = torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1)
        self.means = means.view(NUM_MODES, NUM_CLASSES, 2).transpose(0, 1).contiguous()

    def draw(self, classes: Tensor, seed: int) -> Tensor:
        """[N, 2] of classes int64 [N]."""
        generator = torch.Generator().manual_seed(seed)
        modes = torch.randint(NUM_MODES, (len(classes),), generator=generator)
        return self.means[classes, modes] + SPREAD * torch.randn(len(classes), 2, generator=generator)

    def posterior_mean(self, z: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor) -> Tensor:
        """E[x | z] for z [B, 2], alpha and sigma [B, 1], and the classes that may have made it, 0 or 1 [B, K]."""
        spread = (alpha * SPREAD) ** 2 + sigma**2
        offset = z[:, None] - alpha[:, None] * self.means.flatten(0, 1)
        score = -0.5 * offset.square().sum(-1) / spread
        score = score.masked_fill(allowed.repeat_interleave(NUM_MODES, 1) == 0, -torch.inf)
        weight = score.softmax(1)[..., None]
        return (weight * (self.means.flatten(0, 1) + (alpha * SPREAD**2 / spread)[:, None] * offset)).sum(1)


class MixtureCache(Cache):
    """Draws of the mixture as latents [2, 1, 1]; a caption's states [1, K] are the classes it allows."""

    def __init__(self, mixture: Mixture) -> None:
        self.classes = torch.arange(NUM_DATA) % NUM_CLASSES
        self.latents = mixture.draw(self.classes, seed=1).view(-1, 2, 1, 1)
        self.said = torch.cat([torch.eye(NUM_CLASSES), torch.ones(1, NUM_CLASSES)])[:, None]

    def __len__(self) -> int:
        return NUM_DATA

    null_caption = NUM_CLASSES  # type: ignore[assignment]
    has_prompt_embeds = True  # type: ignore[assignment]

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[images], torch.zeros_like(self.latents[images])

    def captions(self, images: Tensor) -> Tensor:
        return self.classes[images][:, None]

    def states(self, captions: Tensor) -> Tensor:
        return self.said[captions]


class Analytic(nn.Module):
    """The exact denoiser as a network of either prediction type."""

    def __init__(self, mixture: Mixture, prediction_type: Any) -> None:
        super().__init__()
        self.mixture, self.prediction_type = mixture, prediction_type
        self.config = SimpleNamespace(time_cond_proj_dim=None)

    def forward(self, z: Tensor, timesteps: Tensor, states: Tensor) -> Any:
        at = timesteps.long().numpy()
        alpha, sigma = SCHEDULE.alpha[at], SCHEDULE.sigma[at]
        from_z, from_output = (torch.from_numpy(c)[:, None] for c in x0_coefficients(self.prediction_type, alpha, sigma))
        flat = z.flatten(1).double()
        mean = self.mixture.posterior_mean(
            flat, torch.from_numpy(alpha)[:, None], torch.from_numpy(sigma)[:, None], states[:, 0]
        )
        return SimpleNamespace(sample=((mean - from_z * flat) / from_output).float().view_as(z))


class Encoder(nn.Module):
    """z, timestep, class and guidance to features [B, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(2, HIDDEN)
        self.time = nn.Sequential(nn.Linear(EMBEDDING, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.guidance: nn.Linear | None = None
        self.said = nn.Linear(NUM_CLASSES, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(self, z: Tensor, timesteps: Tensor, states: Tensor, timestep_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        half = EMBEDDING // 2
        angles = timesteps[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        embedded = torch.cat([angles.sin(), angles.cos()], 1)
        if self.guidance is not None:
            embedded = embedded + self.guidance(timestep_cond)
        condition = self.time(embedded) + self.said(states[:, 0])
        x = self.into(z.flatten(1)) + condition
        for layer in self.layers:
            x = x + layer(nn.functional.silu(x)) + condition
        return x, condition


class Network(nn.Module):
    """A small network with an encoder and a decoder; `mu` mixes a second encoder in where there is one (CoDi)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(time_cond_proj_dim=None)
        self.encoder = Encoder()
        self.decoder = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.out = nn.Linear(HIDDEN, 2)
        self.adapter: Encoder | None = None

    def adapted(self, efficient: bool) -> Network:
        """A copy with an adapter; alone to learn in the parameter-efficient form."""
        other = copy.deepcopy(self).requires_grad_(not efficient)
        other.adapter = copy.deepcopy(self.encoder).requires_grad_(True)
        other.mu = nn.Parameter(torch.zeros(2))
        return other

    def taught(self) -> Network:
        """A copy that takes w."""
        other = copy.deepcopy(self)
        other.config = SimpleNamespace(time_cond_proj_dim=GUIDANCE_WIDTH)
        if other.encoder.guidance is None:
            other.encoder.guidance = nn.Linear(GUIDANCE_WIDTH, EMBEDDING, bias=False)
            nn.init.zeros_(other.encoder.guidance.weight)
        return other

    def forward(self, z: Tensor, timesteps: Tensor, states: Tensor, timestep_cond: Tensor | None = None) -> Any:
        x, condition = self.encoder(z, timesteps, states, timestep_cond)
        if self.adapter is not None:
            x_c, condition_c = self.adapter(z, timesteps, states, timestep_cond)
            x, condition = torch.lerp(x, x_c, self.mu[0]), torch.lerp(condition, condition_c, self.mu[1])
        for layer in self.decoder:
            x = x + layer(nn.functional.silu(x)) + condition
        return SimpleNamespace(sample=self.out(x).view_as(z))


def trained(spec: TrainSpec, task: Any, network: Network, title: str) -> Network:
    """The network with its averaged weights after the loop of a training."""
    kept: dict[str, Tensor] = {}

    def publish(_network: nn.Module, weights: Iterable[tuple[str, Tensor]], _mark: int) -> None:
        kept.update({name: value.clone() for name, value in weights})

    with tempfile.TemporaryDirectory() as folder:
        train(spec, task, network, Path(folder), publish, title=title)
    network.load_state_dict(kept)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def drawn(
    network: nn.Module, prediction_type: Any, solver: SolverSpec, num_steps: int, classes: Tensor, guidance: float, embeds: bool
) -> Tensor:
    """Samples [N, 2] of classes [N], by the solver's table; two passes where w is not an input."""
    table = solver_coefficients(solver, num_steps, SCHEDULE)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(classes), 2, 1, 1, generator=generator)
    states = torch.eye(NUM_CLASSES)[classes][:, None]
    null, before = torch.ones_like(states), torch.zeros_like(x)
    weight = torch.full((len(classes),), guidance)
    for i in range(table.num_function_evaluations):
        timesteps = torch.full((len(classes),), float(table.timesteps[i]))
        if embeds:
            output = network(x, timesteps, states, timestep_cond=guidance_embedding(weight, GUIDANCE_WIDTH)).sample
        else:
            output = network(x, timesteps, states).sample
            if guidance != 1:
                without = network(x, timesteps, null).sample
                output = without + guidance * (output - without)
        p, q = (float(c[0]) for c in x0_coefficients(prediction_type, table.alpha[i : i + 1], table.sigma[i : i + 1]))
        x0 = p * x + q * output
        x = table.a[i] * x + table.b[i] * x0 + table.c[i] * before + table.s[i] * torch.randn(x.shape, generator=generator)
        x, before = x.float(), x0
    return x.flatten(1)


def sliced(one: Tensor, other: Tensor, classes: Tensor) -> float:
    """Mean over classes of the sliced 1-Wasserstein distance between samples [N, 2] of the same numbers."""
    angles = math.pi * torch.arange(NUM_SLICES) / NUM_SLICES
    slices = torch.stack([angles.cos(), angles.sin()])
    metrics = []
    for each in range(NUM_CLASSES):
        a, b = ((samples[classes == each] @ slices).sort(0).values for samples in (one, other))
        metrics.append((a - b).abs().mean())
    return float(torch.stack(metrics).mean())


def students(
    variant: str, spec: DistillSpec, of: TextToImage, teacher: Analytic, network: Network, images: int
) -> dict[int, tuple[Network, SolverSpec]]:
    """The variant's students by the number of steps that each is for."""
    own = spec.train.model_copy(update={"num_images": images})
    if variant != "progressive":
        start = network.taught() if variant == "consistency" else network.taught().adapted(variant == "codi-efficient")
        kind: type[Distillation] = ConsistencyDistillation if variant == "consistency" else ConditionalConsistencyDistillation
        task = kind(spec, of, teacher, start)
        student = trained(own, task, start, variant)
        return {steps: (student, SolverSpec(name="lcm")) for steps in (1, 2, 4, 8)}
    made: dict[int, tuple[Network, SolverSpec]] = {}
    current, taught = network.taught(), teacher
    for number, steps in enumerate(spec.stages):
        share = spec.train.model_copy(update={"num_images": images // len(spec.stages)})
        task = ProgressiveDistillation(spec, of, taught, current, steps, is_first=number == 0)
        current = trained(share, task, current, f"progressive {steps}")
        made[steps] = (current, SolverSpec())
        taught = current
        current = copy.deepcopy(current).requires_grad_(True)
    return made


def measure(variants: list[str], prediction_type: Any, images: int, told: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    mixture = Mixture()
    cache = MixtureCache(mixture)
    base = TrainSpec(
        num_images=images,
        batch_size=512,
        lr=1e-3,
        lr_schedule="cosine",
        caption_dropout=0.2,
        prediction_type=prediction_type,
        ema_half_life_images=images // 50,
        state_every_images=10**9,
    )
    teacher = Analytic(mixture, prediction_type)
    network = trained(base, TextToImage(base, cache, SCHEDULE), Network(), "network")
    target = 20_000
    spec = DistillSpec(
        guidance_range=(1.0, 3.0),
        guidance_embed_dim=GUIDANCE_WIDTH,
        solver_steps=SOLVER_STEPS,
        target_half_life_images=target,
        stages=(64, 32, 16, 8, 4, 2, 1),
        train=base.model_copy(update={"ema_half_life_images": (images // 50, target), "caption_dropout": 0.1}),
        sweep={"guidance": (1.0,)},
    )
    of = TextToImage(spec.train, cache, SCHEDULE)
    classes = torch.arange(NUM_DRAWN * NUM_CLASSES) % NUM_CLASSES
    truth = mixture.draw(classes, seed=2)
    floor = sliced(mixture.draw(classes, seed=3), truth, classes)
    far = {w: drawn(teacher, prediction_type, SolverSpec(), TEACHER_STEPS, classes, w, False) for w in (1.0, 3.0)}
    of_teacher = sliced(far[1.0], truth, classes)
    rows = [_row("truth against truth", floor), _row("teacher, 50 steps", of_teacher)]
    for steps in (1, 4):
        few = drawn(teacher, prediction_type, SolverSpec(), steps, classes, 1.0, False)
        rows.append(_row(f"teacher, {steps} steps", sliced(few, truth, classes)))
    fitted = drawn(network, prediction_type, SolverSpec(), TEACHER_STEPS, classes, 1.0, False)
    rows.append(_row("network, 50 steps", sliced(fitted, truth, classes)))
    targets = []
    for variant in variants:
        begun = time.monotonic()
        made = students(variant, spec, of, teacher, copy.deepcopy(network).requires_grad_(True), images)
        rows.append(_row(f"{variant}, training", time.monotonic() - begun, "s"))
        for steps in (1, 2, 4, 8):
            student, solver = made[steps]
            at_one = sliced(drawn(student, prediction_type, solver, steps, classes, 1.0, True), truth, classes)
            at_three = sliced(drawn(student, prediction_type, solver, steps, classes, 3.0, True), far[3.0], classes)
            rows += [
                _row(f"{variant}, {steps} steps", at_one),
                _row(f"{variant}, {steps} steps, w = 3, to the teacher", at_three),
            ]
            if steps in (1, 4):
                most = 1.1 if steps == 4 else 2.0
                ratio = at_one / of_teacher
                what = f"{variant}, {steps} steps over teacher"
                targets.append({"what": what, "value": ratio, "target": f"<= {most:g}", "met": ratio <= most})
        told("\n".join(f"{row['what']}: {row['value']:.4g}" for row in rows[-9:]))
    return rows, targets


def _row(what: str, value: float, unit: str = "") -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, "low": None, "high": None}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="a fiftieth of the training, under a minute; proves the path")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--variant", action="append", choices=VARIANTS, help="one variant; may be repeated")
    options.add_argument("--prediction", default="v_prediction", choices=("v_prediction", "epsilon"))
    options.add_argument("--images", type=int, default=3_500_000, help="shown to each student")
    asked = options.parse_args()

    def told(line: str) -> None:
        if not asked.json:
            print(line, flush=True)

    images = asked.images // 50 if asked.quick else asked.images
    rows, targets = measure(list(asked.variant or VARIANTS), asked.prediction_type, images, told)
    for row in rows[:6]:
        told(f"{row['what']}: {row['value']:.4g}")
    print_results("distill", rows, targets)


if __name__ == "__main__":
    main()
