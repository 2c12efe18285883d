"""Few-step students on data with a known distribution: a mixture of Gaussians in the plane, with an exact denoiser as teacher.

    python benchmarks/distill.py [--quick] [--json] [--variant NAME ...] [--images N]

The mixture has three classes of three modes each, on Stable Diffusion's schedule; the class is the prompt. First a small
network is trained on the data. Then the student of each variant starts from it, is trained with the trainer and the losses of
U-Nets (training/distillation.py), and samples with its own solver at w = 1. Scores are sliced Wasserstein distances to the
true distribution per class, compared with the teacher in 50 steps of DDIM. At w = 3, where the true distribution is unknown,
students are compared with samples of the teacher. The last line is JSON.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from results import argument_parser, print_results
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
NUM_DATA, NUM_SLICES = 100_000, 64
SAMPLES_PER_CLASS, QUICK_SAMPLES_PER_CLASS, QUICK_DIVISOR = 10_000, 1000, 200
HIDDEN, TIME_EMBED_DIM, GUIDANCE_EMBED_DIM = 256, 64, 32
SOLVER_STEPS, TEACHER_STEPS = 50, 50
VARIANTS = ("consistency", "codi", "codi-efficient", "progressive")
SCHEDULE = NoiseSchedule.scaled_linear()


class Mixture:
    """A mixture of K classes with M modes each, with means [K, M, 2] and equal weights and widths."""

    def __init__(self) -> None:
        angles = 2 * math.pi * torch.arange(NUM_CLASSES * NUM_MODES) / (NUM_CLASSES * NUM_MODES)
        radius = torch.tensor([1.6, 1.0, 0.6]).repeat(NUM_CLASSES)
        means = torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1)
        self.means = means.view(NUM_MODES, NUM_CLASSES, 2).transpose(0, 1).contiguous()

    def sample(self, classes: Tensor, seed: int) -> Tensor:
        """Samples [N, 2] of classes int64 [N]."""
        generator = torch.Generator().manual_seed(seed)
        modes = torch.randint(NUM_MODES, (len(classes),), generator=generator)
        return self.means[classes, modes] + SPREAD * torch.randn(len(classes), 2, generator=generator)

    def posterior_mean(self, z: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor) -> Tensor:
        """E[x | z] for z [B, 2], alpha and sigma [B, 1], and the allowed classes, 0 or 1, [B, K]."""
        spread = (alpha * SPREAD) ** 2 + sigma**2
        offset = z[:, None] - alpha[:, None] * self.means.flatten(0, 1)
        score = -0.5 * offset.square().sum(-1) / spread
        score = score.masked_fill(allowed.repeat_interleave(NUM_MODES, 1) == 0, -torch.inf)
        weight = score.softmax(1)[..., None]
        return (weight * (self.means.flatten(0, 1) + (alpha * SPREAD**2 / spread)[:, None] * offset)).sum(1)


class MixtureCache(Cache):
    """Samples of the mixture as latents [2, 1, 1]; the prompt embeddings [1, K] are the allowed classes."""

    def __init__(self, mixture: Mixture) -> None:
        self.classes = torch.arange(NUM_DATA) % NUM_CLASSES
        self.latents = mixture.sample(self.classes, seed=1).view(-1, 2, 1, 1)
        self.class_embeds = torch.cat([torch.eye(NUM_CLASSES), torch.ones(1, NUM_CLASSES)])[:, None]

    def __len__(self) -> int:
        return NUM_DATA

    null_caption = NUM_CLASSES  # type: ignore[assignment]
    has_prompt_embeds = True  # type: ignore[assignment]

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[images], torch.zeros_like(self.latents[images])

    def captions(self, images: Tensor) -> Tensor:
        return self.classes[images][:, None]

    def prompt_embeds(self, captions: Tensor) -> Tensor:
        return self.class_embeds[captions]


class ExactDenoiser(nn.Module):
    """The exact denoiser of the mixture as a network of any prediction type."""

    def __init__(self, mixture: Mixture, prediction_type: Any) -> None:
        super().__init__()
        self.mixture, self.prediction_type = mixture, prediction_type
        self.config: dict[str, int | None] = {"time_cond_proj_dim": None}

    def forward(self, z: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Any:
        index = timesteps.long().numpy()
        alpha, sigma = SCHEDULE.alpha[index], SCHEDULE.sigma[index]
        from_z, from_output = (torch.from_numpy(c)[:, None] for c in x0_coefficients(self.prediction_type, alpha, sigma))
        flat = z.flatten(1).double()
        mean = self.mixture.posterior_mean(
            flat, torch.from_numpy(alpha)[:, None], torch.from_numpy(sigma)[:, None], prompt_embeds[:, 0]
        )
        return SimpleNamespace(sample=((mean - from_z * flat) / from_output).float().view_as(z))


class Encoder(nn.Module):
    """Encodes z, timestep, class and guidance to features [B, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(2, HIDDEN)
        self.time = nn.Sequential(nn.Linear(TIME_EMBED_DIM, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.guidance: nn.Linear | None = None
        self.classes = nn.Linear(NUM_CLASSES, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(
        self, z: Tensor, timesteps: Tensor, prompt_embeds: Tensor, timestep_cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        half = TIME_EMBED_DIM // 2
        angles = timesteps[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        embedded = torch.cat([angles.sin(), angles.cos()], 1)
        if self.guidance is not None:
            embedded = embedded + self.guidance(timestep_cond)
        condition = self.time(embedded) + self.classes(prompt_embeds[:, 0])
        x = self.input(z.flatten(1)) + condition
        for layer in self.layers:
            x = x + layer(nn.functional.silu(x)) + condition
        return x, condition


class Network(nn.Module):
    """A small network with an encoder and a decoder; with CoDi, `mu` mixes in the features of a second encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, int | None] = {"time_cond_proj_dim": None}
        self.encoder = Encoder()
        self.decoder = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.out = nn.Linear(HIDDEN, 2)
        self.adapter: Encoder | None = None

    def with_adapter(self, efficient: bool) -> Network:
        """A copy with an adapter; in the parameter-efficient form only the adapter and `mu` are trained."""
        network = copy.deepcopy(self).requires_grad_(not efficient)
        network.adapter = copy.deepcopy(self.encoder).requires_grad_(True)
        network.mu = nn.Parameter(torch.zeros(2))
        return network

    def with_guidance_input(self) -> Network:
        """A copy with guidance as an input."""
        network = copy.deepcopy(self)
        network.config = {"time_cond_proj_dim": GUIDANCE_EMBED_DIM}
        if network.encoder.guidance is None:
            network.encoder.guidance = nn.Linear(GUIDANCE_EMBED_DIM, TIME_EMBED_DIM, bias=False)
            nn.init.zeros_(network.encoder.guidance.weight)
        return network

    def forward(self, z: Tensor, timesteps: Tensor, prompt_embeds: Tensor, timestep_cond: Tensor | None = None) -> Any:
        x, condition = self.encoder(z, timesteps, prompt_embeds, timestep_cond)
        if self.adapter is not None:
            x_c, condition_c = self.adapter(z, timesteps, prompt_embeds, timestep_cond)
            x, condition = torch.lerp(x, x_c, self.mu[0]), torch.lerp(condition, condition_c, self.mu[1])
        for layer in self.decoder:
            x = x + layer(nn.functional.silu(x)) + condition
        return SimpleNamespace(sample=self.out(x).view_as(z))


def train_network(spec: TrainSpec, objective: Any, network: Network, title: str) -> Network:
    """Train a network and return it with its EMA weights."""
    ema_weights: dict[str, Tensor] = {}

    def publish(_network: nn.Module, weights: Iterable[tuple[str, Tensor]], _images_seen: int) -> None:
        ema_weights.update({name: value.clone() for name, value in weights})

    with tempfile.TemporaryDirectory() as folder:
        train(spec, objective, network, Path(folder), publish, title=title)
    network.load_state_dict(ema_weights)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def sample(
    network: nn.Module, prediction_type: Any, solver: SolverSpec, num_steps: int, classes: Tensor, guidance: float, embeds: bool
) -> Tensor:
    """Sample classes [N] with a solver, [N, 2]; without guidance as an input (`embeds`), guidance takes two passes."""
    table = solver_coefficients(solver, num_steps, SCHEDULE)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(classes), 2, 1, 1, generator=generator)
    prompt_embeds = torch.eye(NUM_CLASSES)[classes][:, None]
    null_embeds, x0_prev = torch.ones_like(prompt_embeds), torch.zeros_like(x)
    weight = torch.full((len(classes),), guidance)
    for i in range(table.num_function_evaluations):
        timesteps = torch.full((len(classes),), float(table.timesteps[i]))
        if embeds:
            guidance_embeds = guidance_embedding(weight, GUIDANCE_EMBED_DIM)
            output = network(x, timesteps, prompt_embeds, timestep_cond=guidance_embeds).sample
        else:
            output = network(x, timesteps, prompt_embeds).sample
            if guidance != 1:
                unconditional = network(x, timesteps, null_embeds).sample
                output = unconditional + guidance * (output - unconditional)
        p, q = (float(c[0]) for c in x0_coefficients(prediction_type, table.alpha[i : i + 1], table.sigma[i : i + 1]))
        x0 = p * x + q * output
        noise = torch.randn(x.shape, generator=generator)
        x = table.a[i] * x + table.b[i] * x0 + table.c[i] * x0_prev + table.s[i] * noise
        x, x0_prev = x.float(), x0
    return x.flatten(1)


def sliced_wasserstein(first: Tensor, second: Tensor, classes: Tensor) -> float:
    """Mean over classes of the sliced 1-Wasserstein distance between samples [N, 2] of the same classes [N]."""
    angles = math.pi * torch.arange(NUM_SLICES) / NUM_SLICES
    slices = torch.stack([angles.cos(), angles.sin()])
    distances = []
    for number in range(NUM_CLASSES):
        a, b = ((samples[classes == number] @ slices).sort(0).values for samples in (first, second))
        distances.append((a - b).abs().mean())
    return float(torch.stack(distances).mean())


def train_students(
    variant: str, spec: DistillSpec, base: TextToImage, teacher: ExactDenoiser, network: Network, num_images: int
) -> dict[int, tuple[Network, SolverSpec]]:
    """Train the students of a variant; returns student and solver by the number of steps."""
    guided = network.with_guidance_input()
    if variant != "progressive":
        start = guided if variant == "consistency" else guided.with_adapter(variant == "codi-efficient")
        objective_class: type[Distillation] = (
            ConsistencyDistillation if variant == "consistency" else ConditionalConsistencyDistillation
        )
        train_spec = spec.train.model_copy(update={"num_images": num_images})
        student = train_network(train_spec, objective_class(spec, base, teacher, start), start, variant)
        return {steps: (student, SolverSpec(name="lcm")) for steps in (1, 2, 4, 8)}
    students: dict[int, tuple[Network, SolverSpec]] = {}
    student, stage_teacher = guided, teacher
    for number, steps in enumerate(spec.stages):
        train_spec = spec.train.model_copy(update={"num_images": num_images // len(spec.stages)})
        objective = ProgressiveDistillation(spec, base, stage_teacher, student, steps, is_first=number == 0)
        student = train_network(train_spec, objective, student, f"progressive {steps}")
        students[steps] = (student, SolverSpec())
        stage_teacher = student
        student = copy.deepcopy(student).requires_grad_(True)
    return students


def measure(
    variants: list[str], prediction_type: Any, num_images: int, samples_per_class: int, log: Callable[[str], None]
) -> tuple[list[Any], list[Any]]:
    """Rows and targets."""
    mixture = Mixture()
    cache = MixtureCache(mixture)
    train_spec = TrainSpec(
        num_images=num_images,
        batch_size=512,
        lr=1e-3,
        lr_schedule="cosine",
        caption_dropout=0.2,
        prediction_type=prediction_type,
        ema_half_life_images=num_images // 50,
        state_every_images=10**9,
    )
    teacher = ExactDenoiser(mixture, prediction_type)
    network = train_network(train_spec, TextToImage(train_spec, cache, SCHEDULE), Network(), "network")
    target_half_life = 20_000
    spec = DistillSpec(
        guidance_range=(1.0, 3.0),
        guidance_embed_dim=GUIDANCE_EMBED_DIM,
        solver_steps=SOLVER_STEPS,
        target_half_life_images=target_half_life,
        stages=(64, 32, 16, 8, 4, 2, 1),
        train=train_spec.model_copy(
            update={"ema_half_life_images": (num_images // 50, target_half_life), "caption_dropout": 0.1}
        ),
        sweep={"guidance": (1.0,)},
    )
    base = TextToImage(spec.train, cache, SCHEDULE)
    classes = torch.arange(samples_per_class * NUM_CLASSES) % NUM_CLASSES
    truth = mixture.sample(classes, seed=2)
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []

    def add(what: str, value: float, unit: str = "distance") -> None:
        rows.append({"what": what, "value": value, "unit": unit, "low": None, "high": None})
        log(f"{what}: {value:.4g} {unit}")

    add("second sample of the true distribution", sliced_wasserstein(mixture.sample(classes, seed=3), truth, classes))
    teacher_samples = {
        w: sample(teacher, prediction_type, SolverSpec(), TEACHER_STEPS, classes, w, embeds=False) for w in (1.0, 3.0)
    }
    teacher_distance = sliced_wasserstein(teacher_samples[1.0], truth, classes)
    add(f"teacher, {TEACHER_STEPS} steps", teacher_distance)
    for steps in (1, 4):
        samples = sample(teacher, prediction_type, SolverSpec(), steps, classes, 1.0, embeds=False)
        add(f"teacher, {steps} steps", sliced_wasserstein(samples, truth, classes))
    samples = sample(network, prediction_type, SolverSpec(), TEACHER_STEPS, classes, 1.0, embeds=False)
    add(f"trained network, {TEACHER_STEPS} steps", sliced_wasserstein(samples, truth, classes))
    for variant in variants:
        started = time.monotonic()
        students = train_students(variant, spec, base, teacher, copy.deepcopy(network).requires_grad_(True), num_images)
        add(f"{variant}, training", time.monotonic() - started, "s")
        for steps in (1, 2, 4, 8):
            student, solver = students[steps]
            samples = sample(student, prediction_type, solver, steps, classes, 1.0, embeds=True)
            distance = sliced_wasserstein(samples, truth, classes)
            add(f"{variant}, {steps} steps", distance)
            samples = sample(student, prediction_type, solver, steps, classes, 3.0, embeds=True)
            add(f"{variant}, {steps} steps, w = 3, to the teacher", sliced_wasserstein(samples, teacher_samples[3.0], classes))
            if steps in (1, 4):
                bound = 1.1 if steps == 4 else 2.0
                ratio = distance / teacher_distance
                what = f"{variant}, {steps} steps / teacher"
                targets.append({"what": what, "value": ratio, "target": f"<= {bound:g}", "met": ratio <= bound})
    return rows, targets


def main() -> None:
    quick = f"1/{QUICK_DIVISOR} of the training, under a minute; only checks that the benchmark runs"
    parser = argument_parser(__doc__, quick=quick)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="one variant; may be repeated")
    parser.add_argument("--prediction-type", default="v_prediction", choices=("v_prediction", "epsilon"))
    parser.add_argument("--images", type=int, default=3_500_000, help="training images of each student")
    arguments = parser.parse_args()

    def log(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    num_images = arguments.images // QUICK_DIVISOR if arguments.quick else arguments.images
    samples_per_class = QUICK_SAMPLES_PER_CLASS if arguments.quick else SAMPLES_PER_CLASS
    variants = list(arguments.variant or VARIANTS)
    rows, targets = measure(variants, arguments.prediction_type, num_images, samples_per_class, log)
    print_results("distill", rows, targets)


if __name__ == "__main__":
    main()
