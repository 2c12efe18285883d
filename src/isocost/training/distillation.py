"""Few-step students: what a network is taught so that a few evaluations do, and at one pass whatever the guidance.

Notation: a state is `z_t = alpha_t x + sigma_t eps`; `x(z)`, `eps(z)` are what an output stands for; theta learns, theta-
is its moving average, w is the guidance, which a student takes as an input. The consistency function is

    f(z, t) = c_skip z + c_out x(z),   c_skip = s^2 / (tau^2 + s^2),   c_out = tau / sqrt(tau^2 + s^2),   tau = 10 t, s = 0.5

(arXiv 2303.01469, appendix C, at the scaled time of arXiv 2310.04378): f is the identity at t = 0.

Shapes: B rows, C latent channels, L latent side, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isocost.config.finetune import DistillSpec
from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import x0_coefficients
from isocost.diffusion.solvers import LCM_SIGMA_DATA, LCM_TIMESTEP_SCALING, solver_coefficients
from isocost.models.factory import guidance_embed_dim
from isocost.models.guidance_embedding import guidance_embedding
from isocost.training.objectives import Batch, TextToImage, choices


@dataclass(frozen=True)
class DistillBatch(Batch):
    """A batch on the solver's grid: `indices_to` int64 [B] is where the solver's step leads, `guidance` [B] is w."""

    indices_to: Tensor
    guidance: Tensor


class Prediction(NamedTuple):
    """What an output stands for: clean latent and noise, each [B, C, L, L]."""

    x: Tensor
    noise: Tensor


class Distillation(ABC):
    """What the variants share: states on a grid, a network's predictions, guidance, the average of the student.

    Args:
        spec: the study's choices.
        of: the task that the teacher was trained on; it gives images, captions and what stands beside the latent.
        teacher: the network that is distilled; None where the student is its own.
        student: the network that learns, of which `target` is kept as a copy whose weights are its average.
    """

    def __init__(self, spec: DistillSpec, of: TextToImage, teacher: nn.Module | None, student: nn.Module) -> None:
        self.spec, self.of, self.schedule, self.prediction = spec, of, of.schedule, of.spec.prediction_type
        self.teacher = None if teacher is None else copy.deepcopy(teacher).eval().requires_grad_(False)
        self.guidance_embed_dim = guidance_embed_dim(student)
        self.trainable_params = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        self.target = copy.deepcopy(student).eval().requires_grad_(False)
        alpha, sigma = torch.tensor(self.schedule.alpha), torch.tensor(self.schedule.sigma)
        from_z, from_output = map(torch.from_numpy, x0_coefficients(self.prediction, self.schedule.alpha, self.schedule.sigma))
        timesteps = torch.tensor(self.schedule.timesteps)
        tau = LCM_TIMESTEP_SCALING * timesteps
        skip = LCM_SIGMA_DATA**2 / (tau**2 + LCM_SIGMA_DATA**2)
        out = tau / (tau**2 + LCM_SIGMA_DATA**2).sqrt()
        self.table = torch.stack([alpha, sigma, from_z, from_output, skip, out, timesteps])
        self.null = of.null_prompt_embeds

    # --- what the loop asks ---

    def begin(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Let the target's weights be the student's average, in the same memory."""
        average = averages[self.spec.target_half_life_images]
        device = average[0].device
        self.target.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, value in zip(self.trainable_params, average, strict=True):
            self.target.get_parameter(name).data = value
        self.table, self.null = self.table.to(device), self.null.to(device)
        if self.teacher is not None:
            self.teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> DistillBatch:
        """Rows at the grid's places, with the guidance of each."""
        images = torch.arange(images_seen + rows.start, images_seen + rows.stop)
        words = choices(self.of.key, images)
        chosen = words.timestep
        if self.spec.one_timestep_per_batch:
            size = self.of.spec.batch_size
            chosen = choices(self.of.key, images - images % size).timestep
        index, index_to = self.places(chosen)
        batch = self.of.batch_at(index, images_seen, rows, device, dtype)
        columns = {column.name: getattr(batch, column.name) for column in fields(batch)}
        low, high = self.spec.guidance_range or (1.0, 1.0)
        guidance = low + (high - low) * (words.guidance.double() / 2**32)
        return DistillBatch(
            **columns,
            indices_to=index_to.to(device, non_blocking=True),
            guidance=guidance.to(device, dtype, non_blocking=True),
        )

    @abstractmethod
    def places(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Words in [0, 2^32) int64 [B] -> where rows stand on the schedule, and where the solver's step leads, int64 [B]."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss, a mean over the rows."""
        assert isinstance(batch, DistillBatch), "batch() makes them"
        return self.distance(network, batch)

    @abstractmethod
    def distance(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        """The variant's loss."""

    # --- what the variants say it with ---

    def at(self, indices: Tensor) -> Tensor:
        """Columns (alpha, sigma, p, q, c_skip, c_out, timestep) with `x = p z + q output`, each [B, 1, 1, 1]."""
        return self.table[:, indices].float()[:, :, None, None, None]

    def output(self, network: nn.Module, z: Tensor, batch: DistillBatch, indices: Tensor, **given: Tensor | None) -> Tensor:
        """Raw output at z [B, C, L, L], with what stands beside it; `given` may set `states` and `guidance`."""
        channels = batch.latents.shape[1]
        seen = torch.cat([z, batch.noisy[:, channels:]], dim=1)
        states = given.get("states", batch.states)
        guidance = given.get("guidance", batch.guidance)
        timesteps = self.table[6][indices].to(z)
        if self.guidance_embed_dim is None or guidance is None:
            return network(seen, timesteps, states).sample.float()
        embedded = guidance_embedding(guidance.float(), self.guidance_embed_dim).to(z)
        return network(seen, timesteps, states, timestep_cond=embedded).sample.float()

    def predict(self, output: Tensor, z: Tensor, indices: Tensor) -> Prediction:
        """The clean latent and the noise that an output stands for."""
        alpha, sigma, from_z, from_output, *_ = self.at(indices)
        x = from_z * z + from_output * output
        return Prediction(x, (z - alpha * x) / sigma)

    def consistency_fn(self, network: nn.Module, z: Tensor, batch: DistillBatch, indices: Tensor) -> Tensor:
        """f(z, t), [B, C, L, L]."""
        _, _, _, _, skip, out, _ = self.at(indices)
        return skip * z + out * self.predict(self.output(network, z, batch, indices), z, indices).x

    def guided(self, teacher: nn.Module, z: Tensor, batch: DistillBatch, indices: Tensor) -> Prediction:
        """`uncond + w (cond - uncond)` of a network that takes no w, in two passes, or one where no guidance is learned."""
        output = self.output(teacher, z, batch, indices, guidance=None)
        if self.spec.guidance_range is not None:
            null = self.null.to(batch.states).expand_as(batch.states)
            without = self.output(teacher, z, batch, indices, states=null, guidance=None)
            weight = batch.guidance.float()[:, None, None, None]
            output = without + weight * (output - without)
        return self.predict(output, z, indices)

    def step(self, prediction: Prediction, indices_to: Tensor) -> Tensor:
        """DDIM's step to another place of the schedule (arXiv 2010.02502, eq. 12)."""
        alpha, sigma, *_ = self.at(indices_to)
        return alpha * prediction.x + sigma * prediction.noise

    def state(self, batch: DistillBatch) -> Tensor:
        """The noisy latents alone, [B, C, L, L]."""
        return batch.noisy[:, : batch.latents.shape[1]].float()


def grid_places(words: Tensor, num_steps: int, num_timesteps: int, first: int = 1) -> tuple[Tensor, Tensor]:
    """A step of a trailing grid of `num_steps`, drawn from `first` on: where it starts and where it ends, int64 [B].

    The grid of latent consistency models and of the solver `lcm`: places `stride n - 1`, and 0 below the first.
    """
    stride = num_timesteps // num_steps
    n = first + ((words * (num_steps + 1 - first)) >> 32)
    index = stride * n - 1
    return index, (index - stride).clamp(min=0)


class ConsistencyDistillation(Distillation):
    """Latent consistency distillation (arXiv 2310.04378, algorithm 1; arXiv 2303.01469, algorithm 2).

    `d(f_theta(z_t, w, t), f_theta-(z_s, w, s))` with `z_s` one DDIM step of the guided teacher from z_t, a pseudo-Huber
    distance, t on a grid of `solver_steps`.
    """

    def places(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return grid_places(words, self.spec.solver_steps, self.schedule.num_timesteps)

    def distance(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        assert self.teacher is not None, "the solver's step is the teacher's"
        z = self.state(batch)
        with torch.no_grad():
            earlier = self.step(self.guided(self.teacher, z, batch, batch.indices), batch.indices_to)
            target = self.consistency_fn(self.target, earlier, batch, batch.indices_to)
        difference = self.consistency_fn(network, z, batch, batch.indices) - target
        delta = self.spec.huber_delta
        return ((difference.square() + delta**2).sqrt() - delta).mean()


class ConditionalConsistencyDistillation(Distillation):
    """CoDi (arXiv 2310.01407, section 4.2): the adapting model itself takes the solver's step.

    `|eps_theta(z_t) - eps_theta-(z_s)|^2 + weight |x_theta(z_t) - x|^2` with `z_s = alpha_s x_theta(z_t) + sigma_s
    eps_theta(z_t)`, a step of the model as it is, without a gradient; `x_theta = f`, `eps_theta` the noise that goes with it.
    Where guidance is learned, the clean latent x is moved as guidance moves the teacher's prediction, by `(w - 1)
    (x_teacher(caption) - x_teacher(none))`: at w = 1, and without guidance, the loss is the paper's and needs no teacher.
    """

    def places(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return grid_places(words, self.spec.solver_steps, self.schedule.num_timesteps, first=2)

    def distance(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        z = self.state(batch)
        x = self.consistency_fn(network, z, batch, batch.indices)
        noise = self._noise(x, z, batch.indices)
        with torch.no_grad():
            earlier = self.step(Prediction(x, noise), batch.indices_to)
            there = self.consistency_fn(self.target, earlier, batch, batch.indices_to)
            noise_there = self._noise(there, earlier, batch.indices_to)
            clean = batch.latents.float()
            if self.teacher is not None:
                plain = self.predict(self.output(self.teacher, z, batch, batch.indices, guidance=None), z, batch.indices)
                clean = clean + self.guided(self.teacher, z, batch, batch.indices).x - plain.x
        return (noise - noise_there).square().mean() + self.spec.latent_weight * (x - clean).square().mean()

    def _noise(self, x: Tensor, z: Tensor, indices: Tensor) -> Tensor:
        alpha, sigma, *_ = self.at(indices)
        return (z - alpha * x) / sigma


class ProgressiveDistillation(Distillation):
    """One stage: two DDIM steps of the teacher become one of the student (arXiv 2202.00512, section 3 and algorithm 2).

    The student's target is the x at which one step from z_t ends where the teacher's two do; its error weighs max(SNR, 1).
    In the first stage the teacher is the undistilled network under guidance w, in the others the student of the stage
    before, which takes w (arXiv 2210.03142, section 3; their stage that learns w alone is a part of the first halving here).
    """

    def __init__(
        self, spec: DistillSpec, of: TextToImage, teacher: nn.Module, student: nn.Module, num_steps: int, is_first: bool
    ) -> None:
        """`num_steps` of this stage's student; the teacher takes twice as many."""
        super().__init__(spec, of, teacher, student)
        self.num_steps, self.teacher_is_guided = num_steps, is_first
        fine = solver_coefficients(SolverSpec(), 2 * num_steps, self.schedule).timesteps
        self.fine = torch.tensor([*fine.astype(int), 0])  # DDIM ends at the schedule's first index

    def places(self, words: Tensor) -> tuple[Tensor, Tensor]:
        n = (words * self.num_steps) >> 32
        return self.fine[2 * n], self.fine[2 * n + 2]

    def distance(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        assert self.teacher is not None, "a stage halves the steps of a teacher"
        z = self.state(batch)
        alpha, sigma, *_ = self.at(batch.indices)
        alpha_next, sigma_next, *_ = self.at(batch.indices_to)
        with torch.no_grad():
            middle = self._midpoint(batch.indices)
            halfway = self.step(self._teacher_target(z, batch, batch.indices), middle)
            end = self.step(self._teacher_target(halfway, batch, middle), batch.indices_to)
            ratio = sigma_next / sigma
            target = (end - ratio * z) / (alpha_next - ratio * alpha)
        x = self.predict(self.output(network, z, batch, batch.indices), z, batch.indices).x
        weight = (alpha / sigma).square().clamp(min=1)
        return (weight * (x - target).square()).mean()

    def _teacher_target(self, z: Tensor, batch: DistillBatch, indices: Tensor) -> Prediction:
        assert self.teacher is not None
        if self.teacher_is_guided:
            return self.guided(self.teacher, z, batch, indices)
        return self.predict(self.output(self.teacher, z, batch, indices), z, indices)

    def _midpoint(self, indices: Tensor) -> Tensor:
        fine = self.fine.to(indices.device)
        position = (indices[:, None] == fine[None, :-1]).int().argmax(1)
        return fine[position + 1]
