"""Distillation objectives: train students that sample in a few steps, with a single network pass per step at any guidance.

Notation: a noisy latent is `z_t = alpha_t x + sigma_t eps`; `x(z)` and `eps(z)` are the clean latent and the noise that a
network predicts; theta are the trained weights, theta- their moving average, w is the guidance, an input of the student. The
consistency function is

    f(z, t) = c_skip z + c_out x(z),   c_skip = s^2 / (tau^2 + s^2),   c_out = tau / sqrt(tau^2 + s^2),   tau = 10 t, s = 0.5

(arXiv 2303.01469, appendix C, at the scaled time of arXiv 2310.04378); f is the identity at t = 0.

Shapes: B rows, C latent channels, L latent size, T tokens, D width of the prompt embeddings.
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
from isocost.training.objectives import Batch, TextToImage, sample_draws


@dataclass(frozen=True)
class DistillBatch(Batch):
    """A batch at timesteps of a solver's grid.

    Attributes:
        indices_next: schedule indices after a step of the solver, int64 [B].
        guidance: the guidance w of each row, [B].
    """

    indices_next: Tensor
    guidance: Tensor


class Prediction(NamedTuple):
    """The clean latent and the noise that a network output predicts, each [B, C, L, L]."""

    x0: Tensor
    eps: Tensor


class Distillation(ABC):
    """Base of the distillation objectives: timesteps on a grid, predictions of networks, guidance, the average of the student.

    Args:
        spec: options of the distillation.
        base: the objective that the teacher was trained with; it makes the latents, prompt embeddings and further inputs.
        teacher: the network that is distilled; None if the objective needs none.
        student: the network to train. `target` is a copy of it whose weights are their moving average.
        guide: the network that guides the teacher (`guided_prediction`); None is the teacher itself with the empty prompt.
    """

    def __init__(
        self,
        spec: DistillSpec,
        base: TextToImage,
        teacher: nn.Module | None,
        student: nn.Module,
        guide: nn.Module | None = None,
    ) -> None:
        self.spec, self.base, self.schedule, self.prediction_type = spec, base, base.schedule, base.spec.prediction_type
        self.teacher = None if teacher is None else copy.deepcopy(teacher).eval().requires_grad_(False)
        self.guide = None if guide is None else copy.deepcopy(guide).eval().requires_grad_(False)
        self.guidance_embed_dim = guidance_embed_dim(student)
        self.trainable_params = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        self.target = copy.deepcopy(student).eval().requires_grad_(False)
        alpha, sigma = torch.tensor(self.schedule.alpha), torch.tensor(self.schedule.sigma)
        from_z, from_output = map(
            torch.from_numpy, x0_coefficients(self.prediction_type, self.schedule.alpha, self.schedule.sigma)
        )
        timesteps = torch.tensor(self.schedule.timesteps)
        tau = LCM_TIMESTEP_SCALING * timesteps
        skip = LCM_SIGMA_DATA**2 / (tau**2 + LCM_SIGMA_DATA**2)
        out = tau / (tau**2 + LCM_SIGMA_DATA**2).sqrt()
        self.coefficients = torch.stack([alpha, sigma, from_z, from_output, skip, out, timesteps])
        self.null_prompt_embeds = base.null_prompt_embeds

    # --- the interface of an objective ---

    def on_train_start(self, averages: Mapping[int, list[Tensor]]) -> None:
        """Make the target's weights share the memory of the student's moving average."""
        average = averages[self.spec.target_half_life_images]
        device = average[0].device
        self.target.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, value in zip(self.trainable_params, average, strict=True):
            self.target.get_parameter(name).data = value
        self.coefficients, self.null_prompt_embeds = self.coefficients.to(device), self.null_prompt_embeds.to(device)
        for network in filter(None, (self.teacher, self.guide)):
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> DistillBatch:
        """Make rows at timesteps of the grid, each with its guidance."""
        images = torch.arange(images_seen + rows.start, images_seen + rows.stop)
        draws = sample_draws(self.base.key, images)
        timestep_draws = draws.timestep
        if self.spec.one_timestep_per_batch:
            batch_size = self.base.spec.batch_size
            timestep_draws = sample_draws(self.base.key, images - images % batch_size).timestep
        indices, indices_next = self.sample_timesteps(timestep_draws)
        batch = self.base.batch_at(indices, images_seen, rows, device, dtype)
        columns = {column.name: getattr(batch, column.name) for column in fields(batch)}
        low, high = self.spec.guidance_range or (1.0, 1.0)
        guidance = low + (high - low) * (draws.guidance.double() / 2**32)
        return DistillBatch(
            **columns,
            indices_next=indices_next.to(device, non_blocking=True),
            guidance=guidance.to(device, dtype, non_blocking=True),
        )

    @abstractmethod
    def sample_timesteps(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform integers in [0, 2^32), int64 [B], to schedule indices before and after a solver step, int64 [B] each."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Compute the scalar loss, a mean over the rows."""
        assert isinstance(batch, DistillBatch), "the batch comes from batch()"
        return self.compute_loss(network, batch)

    @abstractmethod
    def compute_loss(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        """Compute the loss of this kind of distillation, a mean over the rows."""

    # --- building blocks of the losses ---

    def coefficients_at(self, indices: Tensor) -> Tensor:
        """Return (alpha, sigma, p, q, c_skip, c_out, timestep) with `x = p z + q output`, each [B, 1, 1, 1]."""
        return self.coefficients[:, indices].float()[:, :, None, None, None]

    def network_output(
        self, network: nn.Module, z: Tensor, batch: DistillBatch, indices: Tensor, **overrides: Tensor | None
    ) -> Tensor:
        """Return the raw output of a network at z [B, C, L, L], with the further inputs of the batch.

        Args:
            overrides: `prompt_embeds` and `guidance` instead of those of the batch.
        """
        channels = batch.latents.shape[1]
        network_input = torch.cat([z, batch.noisy[:, channels:]], dim=1)
        prompt_embeds = overrides.get("prompt_embeds", batch.prompt_embeds)
        guidance = overrides.get("guidance", batch.guidance)
        timesteps = self.coefficients[6][indices].to(z)
        if self.guidance_embed_dim is None or guidance is None:
            return network(network_input, timesteps, prompt_embeds).sample.float()
        embedded = guidance_embedding(guidance.float(), self.guidance_embed_dim).to(z)
        return network(network_input, timesteps, prompt_embeds, timestep_cond=embedded).sample.float()

    def to_x0_eps(self, output: Tensor, z: Tensor, indices: Tensor) -> Prediction:
        """Convert a network output at z to its clean latent and noise."""
        alpha, sigma, from_z, from_output, *_ = self.coefficients_at(indices)
        x0 = from_z * z + from_output * output
        return Prediction(x0, (z - alpha * x0) / sigma)

    def consistency_fn(self, network: nn.Module, z: Tensor, batch: DistillBatch, indices: Tensor) -> Tensor:
        """Return f(z, t), [B, C, L, L]."""
        _, _, _, _, skip, out, _ = self.coefficients_at(indices)
        return skip * z + out * self.to_x0_eps(self.network_output(network, z, batch, indices), z, indices).x0

    def guided_prediction(
        self, teacher: nn.Module, z: Tensor, batch: DistillBatch, indices: Tensor, conditional: Tensor | None = None
    ) -> Prediction:
        """Return the guided prediction of a network without guidance input, in two passes.

        It is `guide + w (cond - guide)` with a guide (autoguidance, arXiv 2406.02507, eq. 3), and `uncond + w (cond - uncond)`
        of the network alone without one. If the student does not learn guidance, it is the conditional prediction in a single
        pass.

        Args:
            teacher: the network.
            z: noisy latents [B, C, L, L].
            batch: prompts, further inputs and guidance of the rows.
            indices: schedule indices of z, int64 [B].
            conditional: raw output [B, C, L, L] of the network with the prompt, where it is known already.
        """
        output = self.network_output(teacher, z, batch, indices, guidance=None) if conditional is None else conditional
        if self.spec.guidance_range is not None:
            overrides: dict[str, Tensor | None] = {"guidance": None}
            if self.spec.guide is None or self.spec.guide.null_prompt:
                overrides["prompt_embeds"] = self.null_prompt_embeds.to(batch.prompt_embeds).expand_as(batch.prompt_embeds)
            second = self.network_output(self.guide or teacher, z, batch, indices, **overrides)
            w = batch.guidance.float()[:, None, None, None]
            output = second + w * (output - second)
        return self.to_x0_eps(output, z, indices)

    def ddim_step(self, prediction: Prediction, indices_next: Tensor) -> Tensor:
        """Take a DDIM step to other timesteps of the schedule (arXiv 2010.02502, eq. 12)."""
        alpha, sigma, *_ = self.coefficients_at(indices_next)
        return alpha * prediction.x0 + sigma * prediction.eps

    def noisy_latents(self, batch: DistillBatch) -> Tensor:
        """Return the noisy latents without further input channels, [B, C, L, L]."""
        return batch.noisy[:, : batch.latents.shape[1]].float()


def sample_grid_step(draws: Tensor, num_steps: int, num_timesteps: int, first: int = 1) -> tuple[Tensor, Tensor]:
    """Draw a step of a trailing grid, the grid of latent consistency models and of the solver `lcm`.

    Args:
        draws: uniform integers in [0, 2^32), int64 [B].
        num_steps: steps of the grid; its schedule indices are `stride n - 1` for n = 1 ... num_steps, and 0.
        num_timesteps: of the schedule.
        first: the lowest n that may be drawn.

    Returns:
        Schedule indices before and after the step, int64 [B] each.
    """
    stride = num_timesteps // num_steps
    n = first + ((draws * (num_steps + 1 - first)) >> 32)
    indices = stride * n - 1
    return indices, (indices - stride).clamp(min=0)


class ConsistencyDistillation(Distillation):
    """Latent consistency distillation (arXiv 2310.04378, algorithm 1; arXiv 2303.01469, algorithm 2).

    The loss is the pseudo-Huber distance of `f_theta(z_t, w, t)` and `f_theta-(z_s, w, s)`, where `z_s` is a DDIM step of the
    guided teacher from z_t, and t is drawn from a grid of `solver_steps`.
    """

    def sample_timesteps(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        return sample_grid_step(draws, self.spec.solver_steps, self.schedule.num_timesteps)

    def compute_loss(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        assert self.teacher is not None, "the teacher takes the solver's step"
        z = self.noisy_latents(batch)
        with torch.no_grad():
            z_next = self.ddim_step(self.guided_prediction(self.teacher, z, batch, batch.indices), batch.indices_next)
            target = self.consistency_fn(self.target, z_next, batch, batch.indices_next)
        difference = self.consistency_fn(network, z, batch, batch.indices) - target
        delta = self.spec.huber_delta
        return ((difference.square() + delta**2).sqrt() - delta).mean()


class ConditionalConsistencyDistillation(Distillation):
    """CoDi (arXiv 2310.01407, section 4.2): the student itself takes the solver's step.

    The loss is `|eps_theta(z_t) - eps_theta-(z_s)|^2 + weight |x_theta(z_t) - x|^2`. Here `z_s = alpha_s x_theta(z_t) + sigma_s
    eps_theta(z_t)` is a step of the student, without gradient; `x_theta = f`, and `eps_theta` is the noise that belongs to it.
    If the student learns guidance, the clean latent x is shifted as guidance shifts the teacher's prediction, by `(w - 1)
    (x_teacher(caption) - x_teacher(empty caption))`, or by `(w - 1) (x_teacher - x_guide)` with a guide. At w = 1, and without
    guidance, this is the paper's loss and needs no teacher.
    """

    def sample_timesteps(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        return sample_grid_step(draws, self.spec.solver_steps, self.schedule.num_timesteps, first=2)

    def compute_loss(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        z = self.noisy_latents(batch)
        x0 = self.consistency_fn(network, z, batch, batch.indices)
        eps = self._eps(x0, z, batch.indices)
        with torch.no_grad():
            z_next = self.ddim_step(Prediction(x0, eps), batch.indices_next)
            target_x0 = self.consistency_fn(self.target, z_next, batch, batch.indices_next)
            target_eps = self._eps(target_x0, z_next, batch.indices_next)
            clean = batch.latents.float()
            if self.teacher is not None:
                output = self.network_output(self.teacher, z, batch, batch.indices, guidance=None)
                unguided = self.to_x0_eps(output, z, batch.indices)
                guided = self.guided_prediction(self.teacher, z, batch, batch.indices, output)
                clean = clean + guided.x0 - unguided.x0
        return (eps - target_eps).square().mean() + self.spec.latent_weight * (x0 - clean).square().mean()

    def _eps(self, x0: Tensor, z: Tensor, indices: Tensor) -> Tensor:
        alpha, sigma, *_ = self.coefficients_at(indices)
        return (z - alpha * x0) / sigma


class ProgressiveDistillation(Distillation):
    """One stage of progressive distillation: a student step replaces two DDIM steps of the teacher.

    The target of the student is the x with which a single step from z_t ends where two steps of the teacher end; its error has
    the weight max(SNR, 1) (arXiv 2202.00512, section 3 and algorithm 2). In the first stage the teacher is the undistilled
    network with guidance w, alone or with its guide, in later stages the student of the stage before, which takes w as an input
    (arXiv 2210.03142, section 3; their separate stage that only learns w is part of the first halving here).
    """

    def __init__(
        self,
        spec: DistillSpec,
        base: TextToImage,
        teacher: nn.Module,
        student: nn.Module,
        num_steps: int,
        is_first: bool,
        guide: nn.Module | None = None,
    ) -> None:
        """
        Args:
            num_steps: sampling steps of this stage's student; the teacher takes twice as many.
            is_first: the teacher is the undistilled network.
            guide: guide of the undistilled network; later stages have none.
        """
        super().__init__(spec, base, teacher, student, guide)
        self.num_steps, self.teacher_takes_cfg = num_steps, is_first
        timesteps = solver_coefficients(SolverSpec(), 2 * num_steps, self.schedule).timesteps
        self.teacher_grid = torch.tensor([*timesteps.astype(int), 0])  # DDIM ends at the schedule's first index

    def sample_timesteps(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        n = (draws * self.num_steps) >> 32
        return self.teacher_grid[2 * n], self.teacher_grid[2 * n + 2]

    def compute_loss(self, network: nn.Module, batch: DistillBatch) -> Tensor:
        assert self.teacher is not None, "the stage halves the steps of a teacher"
        z = self.noisy_latents(batch)
        alpha, sigma, *_ = self.coefficients_at(batch.indices)
        alpha_next, sigma_next, *_ = self.coefficients_at(batch.indices_next)
        with torch.no_grad():
            indices_mid = self._midpoint(batch.indices)
            z_mid = self.ddim_step(self._teacher_prediction(z, batch, batch.indices), indices_mid)
            z_next = self.ddim_step(self._teacher_prediction(z_mid, batch, indices_mid), batch.indices_next)
            ratio = sigma_next / sigma
            target = (z_next - ratio * z) / (alpha_next - ratio * alpha)
        x0 = self.to_x0_eps(self.network_output(network, z, batch, batch.indices), z, batch.indices).x0
        weight = (alpha / sigma).square().clamp(min=1)
        return (weight * (x0 - target).square()).mean()

    def _teacher_prediction(self, z: Tensor, batch: DistillBatch, indices: Tensor) -> Prediction:
        assert self.teacher is not None
        if self.teacher_takes_cfg:
            return self.guided_prediction(self.teacher, z, batch, indices)
        return self.to_x0_eps(self.network_output(self.teacher, z, batch, indices), z, indices)

    def _midpoint(self, indices: Tensor) -> Tensor:
        """Schedule indices after the first of the teacher's two steps, int64 [B]."""
        teacher_grid = self.teacher_grid.to(indices.device)
        position = (indices[:, None] == teacher_grid[None, :-1]).int().argmax(1)
        return teacher_grid[position + 1]
