"""Estimates of hours, memory and disk before a training starts, and settings with which a large network fits."""

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
from isocost.training import throughput_estimate
from isocost.training.memory_estimate import training_memory
from isocost.training.state_checkpoint import newest_state_images
from isocost.training.throughput_estimate import RandomObjective, ThroughputEstimator, disk_bytes
from isocost.training.trainer import Trainer, make_accelerator

SMALL = ModelSpec(width=16, latent_size=8, cross_attention_dim=64, layers_per_block=1, num_levels=2)
SPEC = TrainSpec(num_images=3_600, batch_size=4, ema_half_life_images=(10, 20), keep_last_states=2)


def test_disk_is_the_size_of_states_and_checkpoints(tmp_path: Path) -> None:
    accelerator = make_accelerator(SPEC, tmp_path, "test")
    trainer = Trainer(SPEC, RandomObjective(SMALL, 4), build_unet(SMALL), tmp_path, accelerator)
    trainer.step(trainer.batch(0), 0)
    for seen in (4, 8, 12):
        trainer.training_state.save(seen, SPEC, accelerator)
    assert newest_state_images(tmp_path) == 12
    state_sizes = [file.stat().st_size for file in tmp_path.glob("state-*/part-*.safetensors")]
    number = model_cost(SMALL, 4).num_parameters
    assert len(state_sizes) == SPEC.keep_last_states
    assert disk_bytes(SPEC, number, num_snapshots=0) == pytest.approx(3 * state_sizes[0], rel=0.05)
    assert disk_bytes(SPEC, number, num_snapshots=5) - disk_bytes(SPEC, number, num_snapshots=0) == 20 * number


@pytest.mark.slow
def test_hours_follow_from_measured_steps_and_then_from_gflop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_estimate, "measure_step_times", lambda *_: (0.5, 2.0))
    estimator = ThroughputEstimator(SPEC, 4, disk_free=1 << 40)
    small = estimator(SMALL, 3_600, (3_600,))
    assert small.is_measured
    assert small.hours == pytest.approx(0.5 + 2.0 / 4)
    monkeypatch.setattr(throughput_estimate, "MAX_MEASURE_SECONDS", 0.0)
    large = estimator(SMALL.model_copy(update={"width": 64}), 3_600, (3_600,))
    assert not large.is_measured
    ratio = model_cost(SMALL.model_copy(update={"width": 64}), 4).gflop_per_forward / model_cost(SMALL, 4).gflop_per_forward
    assert large.hours == pytest.approx(small.hours * ratio, rel=1e-6)
    assert "by GFLOP, not measured" in str(large)


def test_the_steps_are_measured() -> None:
    image_s, update_s = throughput_estimate.measure_step_times(SMALL, SPEC, 4, 2)
    assert 0 < image_s < 60
    assert 0 <= update_s < 60


@pytest.mark.slow
def test_the_estimate_of_a_size_that_does_not_fit_names_settings_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_estimate, "measure_step_times", lambda *_: pytest.fail("the size must not be run"))
    spec, model = TrainSpec(num_images=64, batch_size=64, microbatch=64), SMALL.model_copy(update={"latent_size": 16})
    full = training_memory(model, spec, 64, 4)
    minimal = training_memory(model, spec, 1, 4)
    lean = training_memory(model, spec.model_copy(update={"gradient_checkpointing": True}), 1, 4)
    assert minimal.total < full.total
    for free, expected in (
        (full.total - 1, "it fits with train.microbatch: 1"),
        (
            (minimal.total + max(lean.total, minimal.state)) // 2 if lean.total < minimal.total else minimal.total,
            "it fits with",
        ),
        (full.state - 1, "it fits with train.sharding: fsdp over"),
        (1000, "no setting fits; take a device with more memory"),
    ):
        monkeypatch.setattr(throughput_estimate, "memory_free", lambda free=free: free)
        estimate = ThroughputEstimator(spec, 4, disk_free=1 << 40)(model, 64, (64,))
        assert expected in estimate.remedy
        assert estimate.hours is None
    monkeypatch.setattr(throughput_estimate, "memory_free", lambda: 1 << 50)
    monkeypatch.setattr(throughput_estimate, "measure_step_times", lambda *_: (0.1, 0.1))
    assert (
        "of disk are free: take fewer train.snapshots" in ThroughputEstimator(spec, 4, disk_free=1000)(model, 64, (64,)).remedy
    )


def test_the_start_of_a_training_that_cannot_fit_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = model_cost(SMALL, 4)
    assert throughput_estimate.oom_message(SPEC, cost, 1, 1 << 40) == ""
    assert "of disk for its training states" in throughput_estimate.oom_message(SPEC, cost, 1, 1000)
    monkeypatch.setattr(throughput_estimate, "memory_free", lambda: 16 * cost.num_parameters)
    assert "of memory just for weights, moments and averages" in throughput_estimate.oom_message(SPEC, cost, 1, 1 << 40)
    assert throughput_estimate.oom_message(SPEC.model_copy(update={"sharding": "fsdp"}), cost, 2, 1 << 40) == ""


@pytest.mark.slow
def test_gradient_checkpointing_takes_less_memory() -> None:
    model = SMALL.model_copy(update={"latent_size": 32})
    plain, lean = (
        training_memory(model, SPEC.model_copy(update={"gradient_checkpointing": on}), 8, 4).step for on in (False, True)
    )
    assert lean < 0.7 * plain


@pytest.mark.parametrize("changes", [{"adapter": "noisy"}, {"adapter": "concat_cond", "extra_input_channels": 4}])
@pytest.mark.slow
def test_an_adapter_takes_more_memory(changes: dict[str, Any]) -> None:
    adapted, plain = (training_memory(SMALL.model_copy(update=update), SPEC, 2, 4) for update in (changes, {}))
    assert adapted.state > plain.state
    assert adapted.step > plain.step


@pytest.mark.slow
def test_a_study_is_estimated_and_nothing_is_written(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_study(), tmp_path / "out")
    estimates = pipeline.estimate_training()
    assert [estimate.width for estimate in estimates] == [8, 16]
    assert all(estimate.images == 256 and estimate.hours and not estimate.remedy for estimate in estimates)
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()
