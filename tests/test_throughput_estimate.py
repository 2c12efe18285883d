"""What a training will take is said before it starts, and what would fit where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_study
from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.models.flops import model_cost
from isocost.models.unet import build_unet
from isocost.pipeline.pipeline import Pipeline
from isocost.training import throughput_estimate as forecast
from isocost.training.memory_estimate import training_memory
from isocost.training.state_checkpoint import newest_state
from isocost.training.throughput_estimate import RandomTask, ThroughputEstimator, disk_bytes
from isocost.training.trainer import Trainer, make_accelerator

SMALL = ModelSpec(width=16, latent_size=8, cross_attention_dim=64, layers_per_block=1, num_levels=2)
SPEC = TrainSpec(num_images=3_600, batch_size=4, ema_half_life_images=(10, 20), keep_last_states=2)


def test_disk_is_what_the_states_and_checkpoints_take(tmp_path: Path) -> None:
    accelerator = make_accelerator(SPEC, tmp_path, "test")
    trainer = Trainer(SPEC, RandomTask(SMALL, 4), build_unet(SMALL), tmp_path, accelerator)
    trainer.step(trainer.batch(0), 0)
    for seen in (4, 8, 12):
        trainer.state.save(seen, SPEC, accelerator)
    assert newest_state(tmp_path) == 12
    kept = [file.stat().st_size for file in tmp_path.glob("state-*/part-*.safetensors")]
    number = model_cost(SMALL, 4).num_parameters
    assert len(kept) == SPEC.keep_last_states
    assert disk_bytes(SPEC, number, num_snapshots=0) == pytest.approx(3 * kept[0], rel=0.05)
    assert disk_bytes(SPEC, number, num_snapshots=5) - disk_bytes(SPEC, number, num_snapshots=0) == 20 * number


def test_hours_follow_from_measured_steps_and_then_from_gflop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "measure", lambda *_: (0.5, 2.0))
    forecaster = ThroughputEstimator(SPEC, 4, disk_free=1 << 40)
    small = forecaster(SMALL, 3_600, (3_600,))
    assert small.is_measured
    assert small.hours == pytest.approx(0.5 + 2.0 / 4)
    monkeypatch.setattr(forecast, "LONGEST_SECONDS", 0.0)
    large = forecaster(SMALL.model_copy(update={"width": 64}), 3_600, (3_600,))
    assert not large.is_measured
    ratio = model_cost(SMALL.model_copy(update={"width": 64}), 4).gflop_per_forward / model_cost(SMALL, 4).gflop_per_forward
    assert large.hours == pytest.approx(small.hours * ratio, rel=1e-6)
    assert "by GFLOP, not measured" in str(large)


def test_the_steps_are_measured() -> None:
    of_image, of_update = forecast.measure(SMALL, SPEC, 4, 2)
    assert 0 < of_image < 60
    assert 0 <= of_update < 60


def test_a_size_that_does_not_fit_is_told_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "measure", lambda *_: pytest.fail("it was run"))
    spec, model = TrainSpec(num_images=64, batch_size=64, microbatch=64), SMALL.model_copy(update={"latent_size": 16})
    whole = training_memory(model, spec, 64, 4)
    one = training_memory(model, spec, 1, 4)
    lean = training_memory(model, spec.model_copy(update={"gradient_checkpointing": True}), 1, 4)
    assert one.total < whole.total
    for free, said in (
        (whole.total - 1, "train.microbatch: 1 fits"),
        ((one.total + max(lean.total, one.state)) // 2 if lean.total < one.total else one.total, "fits"),
        (whole.state - 1, "train.sharding: fsdp over"),
        (1000, "no setting fits: take a device with more"),
    ):
        monkeypatch.setattr(forecast, "memory_free", lambda free=free: free)
        told = ThroughputEstimator(spec, 4, disk_free=1 << 40)(model, 64, (64,))
        assert said in told.remedy
        assert told.hours is None
    monkeypatch.setattr(forecast, "memory_free", lambda: 1 << 50)
    monkeypatch.setattr(forecast, "measure", lambda *_: (0.1, 0.1))
    assert "of disk are free: fewer snapshots" in ThroughputEstimator(spec, 4, disk_free=1000)(model, 64, (64,)).remedy


def test_a_size_that_cannot_fit_is_warned_of_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = model_cost(SMALL, 4)
    assert forecast.oom_message(SPEC, cost, 1, 1 << 40) == ""
    assert "of disk for its states" in forecast.oom_message(SPEC, cost, 1, 1000)
    monkeypatch.setattr(forecast, "memory_free", lambda: 16 * cost.num_parameters)
    assert "for weights, moments and averages alone" in forecast.oom_message(SPEC, cost, 1, 1 << 40)
    assert forecast.oom_message(SPEC.model_copy(update={"sharding": "fsdp"}), cost, 2, 1 << 40) == ""


def test_gradient_checkpointing_and_bf16_are_forecast_to_take_less() -> None:
    model = SMALL.model_copy(update={"latent_size": 32})
    plain, lean = (
        training_memory(model, SPEC.model_copy(update={"gradient_checkpointing": on}), 8, 4).step for on in (False, True)
    )
    assert lean < 0.7 * plain


@pytest.mark.parametrize("changes", [{"adapter": "noisy"}, {"adapter": "concat_cond", "extra_input_channels": 4}])
def test_a_second_encoder_takes_more(changes: dict[str, Any]) -> None:
    adapted, plain = (training_memory(SMALL.model_copy(update=own), SPEC, 2, 4) for own in (changes, {}))
    assert adapted.state > plain.state
    assert adapted.step > plain.step


def test_a_study_is_forecast_and_nothing_is_written(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_study(), tmp_path / "out")
    told = pipeline.forecast()
    assert [one.width for one in told] == [8, 16]
    assert all(one.images == 256 and one.hours and not one.remedy for one in told)
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()
