"""Trajectories of a model with many small steps, and the timesteps that follow them best.

Shapes: P prompts, K trajectories, T states; a latent is [C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import x0_coefficients
from isocost.diffusion.optimized_timesteps import Trajectories, best_path, join
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.timesteps import make_timesteps
from isocost.errors import ConfigError
from isocost.sampling.generate import CachedPromptKV, schedule_of
from isocost.sampling.sample import Model

NUM_TEACHER_STEPS, NUM_TRAJECTORIES, BATCH_SIZE = 100, 64, 16
TRAJECTORY_SEED = 4_000_000
"""Seed of the noise of the trajectories: not that of images."""


def optimize_timesteps(
    model: Model,
    prompts: Sequence[str],
    num_steps: Sequence[int],
    *,
    guidance: float = 2.0,
    num_trajectories: int = NUM_TRAJECTORIES,
    num_teacher_steps: int = NUM_TEACHER_STEPS,
    is_scaled: bool = False,
    seed: int = TRAJECTORY_SEED,
) -> dict[int, tuple[int, ...]]:
    """The timesteps that follow the model's own trajectories best (arXiv 2405.11326), for `SolverSpec.timesteps`.

    The teacher is DDIM with `num_teacher_steps` steps, `trailing`. A guided model gives other trajectories than one without
    guidance.

    Args:
        model: text-to-image, with a variance-preserving noise schedule.
        prompts: trajectory k has prompt k mod P.
        num_steps: the numbers of steps to find timesteps for.
        guidance: w.
        num_trajectories: K; the paper uses 64 to 256.
        num_teacher_steps: T - 1; the timesteps are some of its own.
        is_scaled: measure errors in the paper's coordinates, see `Trajectories.step_errors`.
        seed: of the noise.

    Returns:
        Number of steps -> its timesteps, falling.

    Raises:
        ConfigError: the model is a flow, there are no prompts, or more steps than the teacher has.
    """
    check_num_steps(prompts, num_steps, num_teacher_steps)
    if num_trajectories < 1:
        raise ConfigError(f"num_trajectories = {num_trajectories}: give 1 or more")
    trajectories = sample_trajectories(model, prompts, guidance, num_trajectories, num_teacher_steps, seed)
    errors = trajectories.step_errors(is_scaled)
    return {steps: tuple(int(trajectories.timesteps[i]) for i in best_path(errors, steps)) for steps in num_steps}


def check_num_steps(prompts: Sequence[str], num_steps: Sequence[int], num_teacher_steps: int) -> None:
    """Check a request before the model is loaded.

    Raises:
        ConfigError: there are no prompts, or more steps than the teacher has.
    """
    if not prompts:
        raise ConfigError("give prompts for the trajectories (--prompt TEXT or --prompts FILE)")
    if wrong := [steps for steps in num_steps if not 1 <= steps < num_teacher_steps]:
        raise ConfigError(f"{wrong[0]} steps: give 1 to {num_teacher_steps - 1}, fewer than the teacher has")


@torch.inference_mode()
def sample_trajectories(
    model: Model, prompts: Sequence[str], guidance: float, num_trajectories: int, num_teacher_steps: int, seed: int
) -> Trajectories:
    """States and predictions of the teacher of `optimize_timesteps`; the latents are those of the model's own scale.

    Raises:
        ConfigError: the model is a flow, or was loaded with `offload`.
    """
    schedule = schedule_of(model.info)
    if schedule.is_flow:
        raise ConfigError(f"{model.checkpoint}: is a flow, which takes no list of timesteps")
    denoiser = model.denoiser
    keys_values = CachedPromptKV(model.encode_prompts(list(prompts)), denoiser)
    steps = make_timesteps(SolverSpec(), num_teacher_steps, schedule)
    alpha, sigma = np.append(steps.alpha, 1.0), np.append(steps.sigma, 0.0)
    guidance = model.info.effective_guidance(guidance)
    info, call = model.info, denoiser.denoise()
    p, q = x0_coefficients(info.prediction_type, steps.alpha, steps.sigma)
    shape = (info.model.latent_channels, info.model.latent_size, info.model.latent_size)
    parts = []
    for start in range(0, num_trajectories, BATCH_SIZE):
        indices = torch.arange(start, min(start + BATCH_SIZE, num_trajectories))
        x = philox_normal(seed, indices, INITIAL_NOISE, shape, denoiser.device)
        conditional = keys_values(indices % len(prompts))
        unconditional = keys_values.null.expand_as(conditional)
        weights = torch.full((len(indices),), float(guidance), device=denoiser.device)
        states, predictions = [x], []
        for i, timestep in enumerate(steps.timesteps):
            timesteps = torch.full((len(indices),), float(timestep), device=denoiser.device)
            output = call(x, timesteps, conditional, weights).float()
            if guidance != 1 and not denoiser.embeds_guidance:
                other = call(x, timesteps, unconditional, weights).float()
                output = other + guidance * (output - other)
            x0 = p[i] * x + q[i] * output
            x = alpha[i + 1] * x0 + sigma[i + 1] / sigma[i] * (x - alpha[i] * x0)
            states.append(x)
            predictions.append(x0)
        parts.append(
            Trajectories(steps.timesteps.astype(np.int64), alpha, sigma, torch.stack(states), torch.stack(predictions))
        )
    return join(parts)
