"""Timesteps that follow a network's trajectories: the search against all paths, closed forms, and the command."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import assert_refused
from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.optimized_timesteps import Trajectories, best_path
from isocost.diffusion.solvers import solver_coefficients
from isocost.diffusion.timesteps import make_timesteps
from isocost.sampling.sample import Model
from isocost.sampling.trajectories import optimize_timesteps, sample_trajectories

CHECKPOINT = Path(__file__).parents[1] / "docs/reference/artefacts/checkpoint/caabdccc783d484b"
SCHEDULE = NoiseSchedule.scaled_linear()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("growth", [1.0, 1.15, 0.8])
def test_the_path_is_the_best_of_all_paths(num_steps: int, growth: float) -> None:
    errors = np.random.default_rng(num_steps).uniform(0.1, 1, (9, 9))
    errors[np.tril_indices(9)] = np.inf

    def cost(path: tuple[int, ...]) -> float:
        return sum(growth**k * errors[i, j] for k, (i, j) in enumerate(itertools.pairwise((*path, 8))))

    best = min(((0, *inner) for inner in itertools.combinations(range(1, 8), num_steps - 1)), key=cost)
    assert tuple(best_path(errors, num_steps, growth)) == best


def test_a_path_cannot_have_more_steps_than_the_teacher() -> None:
    with pytest.raises(ValueError, match="9 steps of a teacher with 8"):
        best_path(np.ones((9, 9)), 9)


def gaussian_trajectories(mean: float, variance: float) -> Trajectories:
    """DDIM with 60 steps on Gaussian data, whose best prediction is known."""
    steps = make_timesteps(SolverSpec(), 60, SCHEDULE)
    alpha, sigma = np.append(steps.alpha, 1.0), np.append(steps.sigma, 0.0)
    x = torch.randn(200, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states, predictions = [x], []
    for i in range(60):
        x0 = mean + alpha[i] * variance / (alpha[i] ** 2 * variance + sigma[i] ** 2) * (x - alpha[i] * mean)
        x = alpha[i + 1] * x0 + sigma[i + 1] / sigma[i] * (x - alpha[i] * x0)
        states.append(x)
        predictions.append(x0)
    return Trajectories(steps.timesteps.astype(np.int64), alpha, sigma, torch.stack(states), torch.stack(predictions))


def test_the_error_of_a_step_of_the_teacher_is_zero_and_grows_with_its_length() -> None:
    errors = gaussian_trajectories(1.0, 0.2).step_errors()
    assert np.allclose(np.diag(errors, 1), 0, atol=1e-9)
    assert np.isinf(errors[np.tril_indices(61)]).all()
    assert (np.diff(errors[10, 11:40]) > 0).all()


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_a_gaussian_is_sampled_better_than_with_trailing_timesteps(num_steps: int) -> None:
    """The spread of DDIM's samples on a Gaussian is a product of factors, so it is exact; the best is that of the data."""
    variance = 0.04
    trajectories = gaussian_trajectories(0.0, variance)
    timesteps = tuple(int(trajectories.timesteps[i]) for i in best_path(trajectories.step_errors(), num_steps))

    def deviation(spec: SolverSpec) -> float:
        table, spread = solver_coefficients(spec, num_steps, SCHEDULE), 1.0
        for i in range(num_steps):
            gain = table.alpha[i] * variance / (table.alpha[i] ** 2 * variance + table.sigma[i] ** 2)
            spread *= table.a[i] + table.b[i] * gain
        return abs(spread - variance**0.5)

    assert deviation(SolverSpec(timesteps=timesteps)) < 0.8 * deviation(SolverSpec())


def test_the_teacher_is_ddim_of_the_engine() -> None:
    model = Model(CHECKPOINT)
    trajectories = sample_trajectories(model, ["a coat"], 2.0, 3, 10, 5)
    images = model.sample("a coat", solver="ddim", num_steps=10, guidance=2.0, num_images=3, seed=5).array[0]
    with torch.inference_mode():
        decoded = model._autoencoder.decode(trajectories.predictions[-1]).permute(0, 2, 3, 1).numpy()
    # DDIM ends at index 0 of the schedule, the teacher at the clean latent: nearly the same images.
    assert np.abs(decoded.astype(int) - images).mean() < 2


def test_a_trained_checkpoint_gets_falling_timesteps_from_the_first() -> None:
    found = optimize_timesteps(Model(CHECKPOINT), ["a coat", "a bag"], [1, 2, 5], num_trajectories=4, num_teacher_steps=20)
    assert found[1] == (999,)
    for num_steps, timesteps in found.items():
        assert len(timesteps) == num_steps
        assert timesteps[0] == 999
        assert SolverSpec(timesteps=timesteps).timesteps == timesteps


def test_the_command_prints_lists_for_a_study(isocost: Any) -> None:
    small = ("--steps", 2, "--steps", 3, "--num-trajectories", 4, "--teacher-steps", 12, "--prompt", "a coat")
    outcome = isocost("optimize-timesteps", CHECKPOINT, *small)
    assert outcome.status == 0, outcome.err
    timesteps = outcome.answer["timesteps"]
    assert [len(timesteps[key]) for key in ("2", "3")] == [2, 3]
    assert f"  - {{name: ddim, timesteps: [{', '.join(map(str, timesteps['3']))}]}}" in outcome.err


def test_wrong_requests_are_one_line(isocost: Any) -> None:
    assert_refused(isocost("optimize-timesteps", CHECKPOINT, "--steps", 2), "give prompts for the trajectories")
    few = ("--steps", 30, "--teacher-steps", 30, "--prompt", "a")
    assert_refused(isocost("optimize-timesteps", CHECKPOINT, *few), "30 steps: give 1 to 29")
    assert_refused(isocost("optimize-timesteps", "nowhere", "--steps", 2, "--prompt", "a"), "nowhere")
