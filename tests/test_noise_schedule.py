"""Comparisons: the schedule with diffusers, Philox with Random123's published vectors, the noise with the normal distribution.

Shape letters: B rows, C H W latent.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from isocost.diffusion.noise_schedule import NoiseSchedule, x0_coefficients
from isocost.diffusion.philox import philox4x32, philox_normal
from isocost.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.scaled_linear()


@pytest.fixture(scope="module")
def oracle():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    return torch.randn(5, 4, 6, 6), torch.randn(5, 4, 6, 6), torch.tensor([0, 1, 400, 998, 999])


def test_the_schedule_is_stable_diffusions(schedule, oracle):
    assert schedule.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle.alphas_cumprod.numpy(), rtol=2e-5)
    assert schedule.alphas_cumprod[-1] == pytest.approx(
        0.00466, abs=1e-5
    )  # as released (arXiv 2305.08891, table 1: 0.068265^2)
    assert math.sqrt(schedule.alphas_cumprod[-1]) == pytest.approx(0.068265, abs=1e-6)


def test_noisy_latents_and_velocities_equal_diffusers(schedule, oracle, batch):
    x0, noise, timesteps = batch
    torch.testing.assert_close(
        schedule.add_noise(x0, noise, timesteps), oracle.add_noise(x0, noise, timesteps), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(
        schedule.velocity(x0, noise, timesteps), oracle.get_velocity(x0, noise, timesteps), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_output_recovers_x0(schedule, batch, prediction_type):
    x0, noise, timesteps = (values.double() if values.is_floating_point() else values for values in batch)
    x = schedule.add_noise(x0, noise, timesteps)
    output = schedule.training_target(prediction_type, x0, noise, timesteps)
    torch.testing.assert_close(schedule.predicted_x0(prediction_type, output, x, timesteps), x0, rtol=0, atol=1e-12)
    p, q = x0_coefficients(prediction_type, schedule.alpha, schedule.sigma)
    assert p.dtype == q.dtype == np.float64


def test_coefficients_cached_in_inference_can_be_trained_with(batch):
    schedule = NoiseSchedule.scaled_linear()
    x0, noise, timesteps = batch
    with torch.inference_mode():
        schedule.add_noise(x0, noise, timesteps)
    trainable = x0.clone().requires_grad_()
    schedule.add_noise(trainable, noise, timesteps).sum().backward()
    assert trainable.grad is not None


def test_wrong_requests_are_rejected(schedule, batch):
    with pytest.raises(ConfigError, match="choose one of epsilon"):
        schedule.training_target("flow", *batch)
    for values in ([0.5, -0.1], [0.5, 0.6], [1.0, 0.5], []):
        with pytest.raises(ConfigError, match="alphas_cumprod"):
            NoiseSchedule.from_alphas_cumprod(np.array(values))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123 1.14, tests/kat_vectors, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    numbers = [torch.tensor([int(word, 16) for word in text.split()]) for text in (counter, key, words)]
    assert philox4x32(numbers[0], numbers[1]).tolist() == numbers[2].tolist()


def test_the_noise_layout_is_as_documented():
    seed, sample_index, evaluation, shape = -3, 2**40 + 7, 12, (3, 2, 3)
    noise = philox_normal(seed, torch.tensor([5, sample_index]), torch.tensor([0, evaluation]), shape, "cpu")[1].flatten()
    expected = []
    for block in range(5):
        counter = torch.tensor([sample_index & 0xFFFFFFFF, sample_index >> 32, evaluation, block])
        words = philox4x32(counter, torch.tensor([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])).tolist()
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            angle = 2 * math.pi * (second + 0.5) / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), expected[:18], rtol=1e-6, atol=1e-7)


def test_the_noise_equals_the_float64_formula_up_to_one_ulp():
    """The formula in numpy's float64, for each of 20,000 elements."""
    ids, shape = torch.arange(5000), (1, 2, 2)
    counter = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 2), torch.zeros_like(ids)])
    words = philox4x32(counter, torch.tensor([[9], [0]])).numpy()
    uniform = (words.astype(np.float64) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    exact = np.stack([radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0])])
    exact = np.concatenate([exact, np.stack([radius[1] * np.cos(angle[1]), radius[1] * np.sin(angle[1])])]).T
    noise = philox_normal(9, ids, 2, shape, "cpu").flatten(1).numpy()
    nearest = exact.astype(np.float32)
    assert np.all(np.abs(noise - nearest) <= np.spacing(np.abs(nearest)))


def test_noise_does_not_depend_on_the_batch():
    ids, shape = torch.arange(40), (4, 5, 5)
    together = philox_normal(7, ids, 3, shape, "cpu")
    for count, order in ((1, ids), (7, ids.flip(0)), (40, ids.roll(13))):
        for chunk in order.split(count):
            assert torch.equal(philox_normal(7, chunk, 3, shape, "cpu"), together[chunk])
    seeds, evaluations = torch.full((40,), 7), torch.full((40,), 3)
    assert torch.equal(philox_normal(seeds, ids, evaluations, shape, "cpu"), together)


def test_every_coordinate_gives_different_noise():
    coordinates = itertools.product((0, 1, 2**32, -1), (0, 1, 2**32), (0, 1, 2))
    noises = [
        philox_normal(seed, torch.tensor([image]), evaluation, (4, 8, 8), "cpu") for seed, image, evaluation in coordinates
    ]
    correlation = np.corrcoef(torch.cat(noises).flatten(1).numpy())
    assert np.abs(correlation - np.eye(len(noises))).max() < 0.35  # 630 pairs of 256 elements: 5.5 standard errors


def test_noise_is_standard_normal():
    noise = philox_normal(0, torch.arange(1500), 0, (4, 8, 8), "cpu").double().flatten(1)
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((noise**power).mean()) - moment) < 4 * math.sqrt(variance / count)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    for offset in (1, 2, 3, 4):  # neighbours inside and across the four elements of a block
        assert abs(float((noise[:, offset:] * noise[:, :-offset]).mean())) < 4 / math.sqrt(count * (1 - offset / 256))
    assert float(noise.abs().max()) > 4.5
