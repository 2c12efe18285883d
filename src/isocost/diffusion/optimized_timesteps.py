"""Timesteps that follow the trajectories of one network: dynamic programming over the errors of single steps.

Chen et al., arXiv 2405.11326 (GITS): a teacher runs many small steps. For every pair of its states the error of one large step
from the first to the second is measured. The path of S steps with the lowest sum of errors is the list of timesteps.

Shapes: T states of the teacher's trajectories, of which the last is the clean latent; K trajectories; a latent is [C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isocost.diffusion.noise_schedule import Floats

ERROR_GROWTH = 1.15
"""Factor by which the errors of all later steps count more than that of a step, as in the paper's experiments."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """States of a teacher and its predictions.

    Attributes:
        timesteps: int64 [T - 1], falling; the last state has none.
        alpha, sigma: float64 [T], `x = alpha x0 + sigma noise`; 1 and 0 at the clean end.
        states: [T, K, C, H, W].
        predictions: [T - 1, K, C, H, W], the predicted clean latents at the states before the last.
    """

    timesteps: np.ndarray
    alpha: Floats
    sigma: Floats
    states: Tensor
    predictions: Tensor

    def step_errors(self, is_scaled: bool = False) -> Floats:
        """Mean distance between one DDIM step from state i to state j and the teacher's state j, [T, T]; inf where j <= i.

        Args:
            is_scaled: distances between `x / alpha`, the paper's coordinates, in which errors at high noise weigh more. By
                default they are between the latents `x` themselves: later steps remove most of an error at high noise.
        """
        num_states = len(self.alpha)
        errors = np.full((num_states, num_states), np.inf)
        for i in range(num_states - 1):
            prediction = self.predictions[i]
            noise = (self.states[i] - self.alpha[i] * prediction) / self.sigma[i]
            for j in range(i + 1, num_states):
                difference = self.alpha[j] * prediction + self.sigma[j] * noise - self.states[j]
                distance = float(difference.flatten(1).norm(dim=1).mean())
                errors[i, j] = distance / self.alpha[j] if is_scaled else distance
        return errors


def best_path(errors: Floats, num_steps: int, error_growth: float = ERROR_GROWTH) -> list[int]:
    """The states from which `num_steps` steps start, so that the sum of their errors is lowest.

    Args:
        errors: [T, T], of a step from state i to state j.
        num_steps: S.
        error_growth: the errors after a step count this much more.

    Returns:
        S indices below T - 1, rising from 0; the last step leads to state T - 1.

    Raises:
        ValueError: there are more steps than the teacher has.
    """
    if not 1 <= num_steps < len(errors):
        raise ValueError(f"{num_steps} steps of a teacher with {len(errors) - 1}")
    costs = errors[:, -1]
    choices: list[np.ndarray] = []
    for _ in range(num_steps - 1):
        totals = errors + error_growth * costs[None, :]
        totals[:, -1] = np.inf
        choices.append(totals.argmin(axis=1))
        costs = totals.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path


def join(parts: list[Trajectories]) -> Trajectories:
    """Trajectories of several calls in one."""
    first = parts[0]
    states, predictions = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("states", "predictions"))
    return Trajectories(first.timesteps, first.alpha, first.sigma, states, predictions)
