"""Training objectives: the n-th image of a training owns its latent, noise, timestep, caption and dropout.

Oracles: scipy's tests of distributions, the min-SNR weights of diffusers.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from scipy import stats
from torch import Tensor

from isocost.config.base import parse_spec
from isocost.config.model import TextEncoderSpec
from isocost.config.training import TrainSpec
from isocost.data.latent_cache import ImageDataset, LatentCache, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.data.shuffle import shuffled_indices
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.errors import ConfigError
from isocost.models.checkpoint import scheduler_for
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.training.lr_schedule import learning_rate
from isocost.training.objectives import Batch, TextToImage, loss_weights, sample_draws, training_key, training_schedule

NUM_IMAGES, STDS = 10, torch.tensor([0.5, 2.0])
CPU = torch.device("cpu")


class Spread:
    """An autoencoder with known moments: the mean is the image's grey level, the std depends on the channel."""

    latent_channels, factor = 2, 16
    fallbacks: tuple[str, ...] = ()

    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        mean = batch[:, :1, :1, :1].float().expand(-1, 2, 2, 2)
        return mean, STDS[:, None, None].expand_as(mean)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Ten grey images; the n-th has 1 + n % 3 captions."""
    levels = torch.arange(NUM_IMAGES, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    captions = [tuple(f"caption {n} {k}" for k in range(1 + n % 3)) for n in range(NUM_IMAGES)]
    images = ImageDataset(levels, captions, [str(n) for n in range(NUM_IMAGES)], None)
    store = ShardStore(tmp_path_factory.mktemp("cache"))
    write_index(store, write_cache(store, images.read, Spread(), MiniLMTextEncoder(TextEncoderSpec(max_tokens=12))))
    return LatentCache(store)


def make_objective(cache: LatentCache, **changes: object) -> TextToImage:
    spec = TrainSpec.model_validate({"num_images": 1, "prediction_type": "sample", "caption_dropout": 0.0, **changes})
    return TextToImage(spec, cache, NoiseSchedule.scaled_linear())


def joined(batches: list[Batch]) -> Batch:
    names = [column.name for column in fields(Batch)]
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


@pytest.mark.parametrize("cuts", [(0, 16), (0, 8, 16), (0, 1, 5, 16), tuple(range(17))])
def test_rows_do_not_depend_on_the_other_rows_of_a_call(cache: LatentCache, cuts: tuple[int, ...]) -> None:
    objective = make_objective(cache, caption_dropout=0.3, prediction_type="v_prediction")
    whole = objective.batch(48, range(16), CPU)
    parts = joined([objective.batch(48, range(a, b), CPU) for a, b in pairwise(cuts)])
    shifted = objective.batch(40, range(8, 24), CPU)
    for name in ("noisy", "timesteps", "prompt_embeds", "target", "weights"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
        assert torch.equal(getattr(whole, name), getattr(shifted, name)), name


def test_other_seeds_and_positions_give_other_rows_and_the_global_random_state_does_not_change(cache: LatentCache) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = make_objective(cache).batch(0, range(16), CPU)
    other, later = make_objective(cache, seed=1).batch(0, range(16), CPU), make_objective(cache).batch(16, range(16), CPU)
    assert not torch.equal(first.noisy, other.noisy)
    assert not torch.equal(first.noisy, later.noisy)
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_are_drawn_from_their_moments(cache: LatentCache) -> None:
    """Kolmogorov-Smirnov against the normal; no two channels, positions or images share their noise."""
    target = make_objective(cache).batch(0, range(3200), CPU).target
    order = shuffled_indices(0, 0, 3200, NUM_IMAGES)
    noise = (target - order[:, None, None, None]) / STDS[:, None, None]
    for channel in range(2):
        assert stats.kstest(noise[:, channel].flatten().numpy(), "norm").pvalue > 1e-4
    rows = noise.flatten(1).double().numpy()
    assert np.abs(np.corrcoef(rows.T) - np.eye(rows.shape[1])).max() < 5 / len(rows) ** 0.5
    assert abs(np.corrcoef(rows[:-1].flatten(), rows[1:].flatten())[0, 1]) < 5 / rows.size**0.5


def test_the_diffusion_noise_is_independent_of_the_latent_draw(cache: LatentCache) -> None:
    latents = make_objective(cache).batch(0, range(2000), CPU).target
    noise = make_objective(cache, prediction_type="epsilon").batch(0, range(2000), CPU).target
    latent_draws = (latents - shuffled_indices(0, 0, 2000, NUM_IMAGES)[:, None, None, None]) / STDS[:, None, None]
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noise.flatten(), latent_draws.flatten())[0, 1]) < 5 / noise.numel() ** 0.5


def test_timesteps_captions_and_dropout_are_uniform_and_independent() -> None:
    draws = [values.double().numpy() / 2**32 for values in sample_draws(training_key(0), torch.arange(20_000))]
    for values in draws:
        assert stats.kstest(values, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 5 / 20_000**0.5
    assert training_key(0) != training_key(1)


def test_every_caption_of_an_image_is_equally_likely_and_dropped_at_its_rate(cache: LatentCache) -> None:
    numbers = torch.arange(9000)
    indices = shuffled_indices(0, 0, len(numbers), NUM_IMAGES)
    _, caption_draws, dropout_draws, _ = sample_draws(training_key(0), numbers)
    objective = make_objective(cache)
    chosen = objective._captions(indices, caption_draws, dropout_draws)
    for image in range(NUM_IMAGES):
        captions = cache.captions(torch.tensor([image]))[0]
        counts = [int((chosen[indices == image] == caption).sum()) for caption in captions[captions >= 0]]
        assert sum(counts) == 900
        assert len(counts) == 1 or stats.chisquare(counts).pvalue > 1e-4
    thinned = make_objective(cache, caption_dropout=0.2)._captions(indices, caption_draws, dropout_draws)
    dropped = thinned == cache.null_caption
    assert stats.binomtest(int(dropped.sum()), len(numbers), 0.2).pvalue > 1e-4
    assert torch.equal(thinned[~dropped], chosen[~dropped])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers(prediction_type: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    spec = TrainSpec.model_validate({"num_images": 1, "prediction_type": prediction_type, "min_snr_gamma": 5.0})
    scheduler: DDIMScheduler = scheduler_for(prediction_type)  # type: ignore[arg-type]
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + 1 if prediction_type == "v_prediction" else snr)
    assert np.allclose(loss_weights(schedule, spec), expected.numpy(), rtol=1e-3)


def test_the_loss_is_the_mean_of_weighted_squares(cache: LatentCache) -> None:
    objective = make_objective(cache, prediction_type="epsilon", min_snr_gamma=5.0)
    batch = objective.batch(0, range(64), CPU)

    class ZeroNetwork(torch.nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> object:
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    expected = (batch.target.square().mean((1, 2, 3)) * batch.weights).mean()
    assert torch.allclose(objective.loss(ZeroNetwork(), batch), expected.to(torch.float32), rtol=1e-5)
    assert batch.weights.min() < batch.weights.max() <= 1


def test_captions_are_encoded_in_the_step_if_no_prompt_embeddings_are_cached(cache: LatentCache, tmp_path: Path) -> None:
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=12))
    levels = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    images = ImageDataset(levels, [(f"number {n}",) for n in range(4)], list("0123"), None)
    prompt_embeds = {}
    for with_prompt_embeds in (True, False):
        store = ShardStore(tmp_path / str(with_prompt_embeds))
        write_index(store, write_cache(store, images.read, Spread(), text, with_prompt_embeds=with_prompt_embeds))
        objective = TextToImage(TrainSpec(num_images=1), LatentCache(store), NoiseSchedule.scaled_linear(), text)
        prompt_embeds[with_prompt_embeds] = objective.batch(0, range(8), CPU).prompt_embeds
        assert not prompt_embeds[with_prompt_embeds].is_inference(), "autograd must accept them"
    assert torch.allclose(prompt_embeds[True], prompt_embeds[False], atol=5e-3)


@pytest.mark.parametrize(
    ("prediction_type", "rescale_betas_zero_snr"), [("v_prediction", True), ("flow_prediction", False), ("sample", False)]
)
def test_a_batch_follows_the_noise_schedule_of_its_prediction_type(
    cache: LatentCache, prediction_type: str, rescale_betas_zero_snr: bool
) -> None:
    spec = TrainSpec.model_validate(
        {"num_images": 1, "prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    )
    schedule = training_schedule(spec)
    batch = TextToImage(spec, cache, schedule).batch(0, range(512), CPU)
    clean = TextToImage(spec.model_copy(update={"prediction_type": "sample"}), cache, schedule).batch(0, range(512), CPU).target
    index = torch.from_numpy(np.searchsorted(schedule.timesteps, batch.timesteps.double().numpy() - 1e-3))
    assert torch.allclose(schedule.predicted_x0(prediction_type, batch.target, batch.noisy, index), clean, atol=1e-3)  # type: ignore[arg-type]
    assert schedule.has_zero_terminal_snr == (prediction_type != "sample")
    noisiest = batch.noisy[index == schedule.num_timesteps - 1]
    assert len(noisiest) == 0 or noisiest.abs().max() < 5


def test_zero_terminal_snr_is_refused_for_epsilon() -> None:
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr needs prediction_type: v_prediction"):
        parse_spec(TrainSpec, {"num_images": 1, "rescale_betas_zero_snr": True}, "study")


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_learning_rates_follow_their_schedule(schedule: str) -> None:
    plain = {"num_images": 1000, "batch_size": 10, "lr": 1.0, "warmup_images": 100, "lr_schedule": schedule}
    spec = TrainSpec.model_validate(plain)
    rates = [learning_rate(spec, seen) for seen in range(0, 1000, 10)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)], rel=0.03)
    if schedule == "constant":
        assert set(rates[10:]) == {1.0}
        assert "num_images" not in spec.recipe()
        return
    assert spec.recipe()["num_images"] == 1000
    assert rates[-1] == pytest.approx(0.0003 if schedule == "cosine" else 0.05, rel=0.1)
    middle = learning_rate(spec, 550)
    assert middle == pytest.approx(0.5 if schedule == "cosine" else 1.0)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
