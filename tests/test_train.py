"""Training: an interrupted training ends with the bits of an uninterrupted one, and diffusers loads the checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from isocost.config.data import ScenesSource
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.training import TrainSpec
from isocost.data.latent_cache import LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.errors import ConfigError, RunError
from isocost.experiments.base import make_run
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.checkpoint import WEIGHTS, load_checkpoint, save_networks
from isocost.models.factory import read_network
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.models.unet import build_unet
from isocost.training.ema import Ema
from isocost.training.lr_schedule import learning_rate
from isocost.training.objectives import Batch, TextToImage
from isocost.training.state_checkpoint import newest_state_images
from isocost.training.trainer import DeadlineReached, Trainer, train

MODEL = ModelSpec(width=8, latent_channels=4, latent_size=8, cross_attention_dim=384, layers_per_block=1, num_levels=2)
SPEC = TrainSpec(num_images=192, snapshots=(64, 100), batch_size=16, lr=2e-3, warmup_images=64, state_every_images=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    store = ShardStore(tmp_path_factory.mktemp("cache"))
    images = load_images(ScenesSource(kind="scenes", num_images=96), 32, 0)
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    write_index(store, write_cache(store, images.read, PCAAutoencoder.fit(images.images, 4, 4), text))
    return LatentCache(store)


def run(spec: TrainSpec, cache: LatentCache, folder: Path, deadline: float | None = None) -> dict[int, dict[str, torch.Tensor]]:
    """Train from the newest state in the folder; returns the weights saved at each snapshot."""
    saved: dict[int, dict[str, torch.Tensor]] = {}

    def save_snapshot(network: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], snapshot: int) -> None:
        saved[snapshot] = {name: tensor.clone() for name, tensor in weights}

    torch.manual_seed(spec.seed)
    network = build_unet(MODEL)
    objective = TextToImage(spec, cache, NoiseSchedule.scaled_linear())
    train(spec, objective, network, folder, save_snapshot, title="test", snapshots=spec.all_snapshots(1.0), deadline=deadline)
    return saved


def test_an_interrupted_training_ends_with_the_same_bits(cache: LatentCache, tmp_path: Path) -> None:
    uninterrupted = run(SPEC, cache, tmp_path / "whole")
    assert sorted(uninterrupted) == [64, 100, 192]
    stops = 0
    interrupted: dict[int, dict[str, torch.Tensor]] = {}
    while 192 not in interrupted:
        try:
            interrupted |= run(SPEC, cache, tmp_path / "broken", deadline=time.monotonic() + (0 if stops < 4 else 600))
        except DeadlineReached:
            stops += 1
    assert stops == 4
    for name, tensor in uninterrupted[192].items():
        assert torch.equal(tensor, interrupted[192][name]), name
    assert newest_state_images(tmp_path / "broken") == 192
    lines = [json.loads(line)["images_seen"] for line in (tmp_path / "broken" / "loss.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))


@pytest.mark.fast_cases(1)
def test_a_longer_training_starts_with_the_same_steps_as_a_shorter_one(cache: LatentCache, tmp_path: Path) -> None:
    shorter = run(SPEC.model_copy(update={"num_images": 64, "snapshots": ()}), cache, tmp_path / "run")
    longer = run(SPEC.model_copy(update={"num_images": 128, "snapshots": ()}), cache, tmp_path / "run")
    reference = run(SPEC.model_copy(update={"num_images": 128, "snapshots": (64,)}), cache, tmp_path / "straight")
    for name, tensor in reference[64].items():
        assert torch.equal(tensor, shorter[64][name])
        assert torch.equal(reference[128][name], longer[128][name])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.fast_cases(1)
def test_the_loss_falls(cache: LatentCache, tmp_path: Path, prediction_type: str) -> None:
    spec = SPEC.model_copy(
        update={"num_images": 960, "snapshots": (), "prediction_type": prediction_type, "state_every_images": 10_000}
    )
    run(spec, cache, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.93 * losses[0]


def test_bf16_trains_and_a_missing_tracker_is_an_error(cache: LatentCache, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"num_images": 32, "snapshots": (), "dtype": "bf16"})
    saved = run(spec, cache, tmp_path / "bf16")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved[32].values())
    with pytest.raises(ConfigError, match="wandb is not installed"):
        run(spec.model_copy(update={"tracker": "wandb"}), cache, tmp_path / "tracked")


def test_a_nonfinite_loss_stops_the_training_and_the_last_good_state_stays(cache: LatentCache, tmp_path: Path) -> None:
    good = SPEC.model_copy(update={"num_images": 48, "snapshots": ()})
    run(good, cache, tmp_path)

    class Broken(TextToImage):
        def loss(self, network: nn.Module, batch: object) -> torch.Tensor:
            return super().loss(network, batch) * float("nan")  # type: ignore[arg-type]

    spec = SPEC.model_copy(update={"snapshots": ()})
    with pytest.raises(RunError, match="the mean loss is nan"):
        train(
            spec, Broken(spec, cache, NoiseSchedule.scaled_linear()), build_unet(MODEL), tmp_path, lambda *_: None, title="test"
        )
    assert newest_state_images(tmp_path) == 48


@pytest.mark.parametrize(
    ("images", "part", "value"),
    [(64, "weights", math.nan), (64, "average", math.inf), (160, "weights", -math.inf), (192, "weights", math.nan)],
)
@pytest.mark.fast_cases(1)
def test_a_last_update_that_breaks_the_weights_is_never_saved(
    images: int, part: str, value: float, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the step that ends at `images`, the loss of that step is still finite; at 160 only a state is due."""
    step = Trainer.step

    def breaking(trainer: Trainer, batch: Batch, images_seen: int) -> torch.Tensor:
        loss = step(trainer, batch, images_seen)
        if images_seen + SPEC.batch_size == images:
            with torch.no_grad():
                tensors = list(trainer.model.trainable_params.values()) if part == "weights" else trainer.ema.averages[0]
                tensors[-1].view(-1)[-1] = value
        return loss

    saved: list[int] = []
    objective = TextToImage(SPEC, cache, NoiseSchedule.scaled_linear())
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", breaking)
        with pytest.raises(RunError, match=f"weights contain NaN or inf after {images} training images.*lower train.lr"):
            train(
                *(SPEC, objective, build_unet(MODEL), tmp_path, lambda *arguments: saved.append(arguments[2])),
                **{"title": "test", "snapshots": SPEC.all_snapshots(1.0)},
            )
    expected = {64: ([], 48), 160: ([64, 100], 112), 192: ([64, 100], 160)}[images]
    assert (saved, newest_state_images(tmp_path)) == expected
    # The snapshot of 100 images is due after 112; a run that resumes from the state of 112 saves it again.
    resumed = {64: {64, 100, 192}, 160: {100, 192}, 192: {192}}[images]
    assert set(run(SPEC, cache, tmp_path)) == resumed, "the same command resumes"


def test_a_damaged_training_state_is_an_error(cache: LatentCache, tmp_path: Path) -> None:
    run(SPEC.model_copy(update={"num_images": 48, "snapshots": ()}), cache, tmp_path)
    (state,) = tmp_path.glob("state-*")
    for name, content in (
        ("part-00000.json", "[]"),
        ("part-00000.json", "[" * 100_000),
        ("isocost.json", '{"images_seen": "x", "num_parts": 1}'),
        ("isocost.json", '{"images_seen": 48, "num_parts": "x"}'),
        ("part-00000.safetensors", "broken"),
    ):
        whole = (state / name).read_bytes()
        (state / name).write_text(content)
        with pytest.raises(RunError, match="the training state cannot be read") as stopped:
            run(SPEC, cache, tmp_path)
        assert "\n" not in str(stopped.value)
        (state / name).write_bytes(whole)


def test_an_incomplete_training_state_is_ignored(cache: LatentCache, tmp_path: Path) -> None:
    run(SPEC.model_copy(update={"num_images": 48, "snapshots": ()}), cache, tmp_path)
    (tmp_path / ".state-000000000096").mkdir()
    run(SPEC, cache, tmp_path)
    assert not list(tmp_path.glob(".state-*"))
    assert newest_state_images(tmp_path) == 192


def test_an_ema_moves_halfway_in_its_half_life() -> None:
    weight = torch.zeros(1)
    ema = Ema([weight], (64, 128))
    weight += 1
    for step in range(4):
        ema.update(images_seen=100_000 + 16 * step, batch_size=16)
    assert float(ema.averages[0][0]) == pytest.approx(0.5, abs=1e-6)
    assert float(ema.averages[1][0]) == pytest.approx(1 - 0.5**0.5, abs=1e-6)


def test_the_learning_rate_warms_up_in_images() -> None:
    rates = [learning_rate(SPEC, seen) for seen in (0, 16, 48, 64, 10_000)]
    assert rates == pytest.approx([2e-3 / 4, 2e-3 / 2, 2e-3, 2e-3, 2e-3])


# --- the checkpoint folder --------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_in_diffusers(tmp_path: Path) -> None:
    network = build_unet(MODEL)
    save_networks(tmp_path, network, "v_prediction")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", use_safetensors=True)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.allclose(
        scheduler.alphas_cumprod.double(), torch.from_numpy(NoiseSchedule.scaled_linear().alphas_cumprod.copy()), atol=1e-6
    )
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_bf16_checkpoint_is_half_as_large_and_has_its_own_digest(tmp_path: Path) -> None:
    network = build_unet(MODEL)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        save_networks(tmp_path / name, network, "v_prediction", dtype=dtype)
    loaded = read_network(tmp_path / "bf16" / "unet")
    for original, parameter in zip(network.parameters(), loaded.parameters(), strict=True):
        assert parameter.dtype is torch.float32
        assert torch.equal(original.bfloat16().float(), parameter)
    fp32_size, bf16_size = ((tmp_path / name / "unet" / WEIGHTS).stat().st_size for name in ("fp32", "bf16"))
    assert 0.5 <= bf16_size / fp32_size < 0.6
    runs = [make_run("text2image", MODEL, SPEC.model_copy(update={"snapshot_dtype": p}), {}, 1.0) for p in ("fp32", "bf16")]
    assert runs[0].digest == runs[1].digest
    assert runs[0].checkpoints.keys() == runs[1].checkpoints.keys()
    assert set(runs[0].checkpoints.values()).isdisjoint(runs[1].checkpoints.values())


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(ConfigError, match="not an isocost checkpoint"):
        load_checkpoint(tmp_path)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pickled weights are refused|convert a file"):
        load_checkpoint(pickle)
    with pytest.raises(ConfigError, match=r"pickled weights are refused|convert a file"):
        load_checkpoint(tmp_path)
