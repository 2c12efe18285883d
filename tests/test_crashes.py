"""kill -9 at any moment, a full disk, a damaged shard: a training resumes from complete files, or stops with one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isocost.config.data import ScenesSource
from isocost.config.model import TextEncoderSpec
from isocost.data.latent_cache import LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.errors import RunError
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.training import state_checkpoint as state
from isocost.training.state_checkpoint import newest_state_images
from train_worker import run_job

WORKER = Path(__file__).with_name("kill_worker.py")
SPEC = {"num_images": 160, "batch_size": 16, "microbatch": 16, "lr": 1e-3, "state_every_images": 16, "ema_half_life_images": 64}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """A cache of patch means. The sign of a PCA basis depends on the processor; these latents do not."""
    store = ShardStore(tmp_path_factory.mktemp("cache"))
    images = load_images(ScenesSource(kind="scenes", num_images=48), 32, 0)
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    basis = torch.zeros(4, 48)
    for channel in range(3):
        basis[channel, 16 * channel : 16 * channel + 16] = 0.25
    basis[3, :16] = torch.tensor([0.25, -0.25]).repeat_interleave(8)
    autoencoder = PCAAutoencoder(torch.zeros(48), basis, torch.full((4,), 2.0), 4)
    write_index(store, write_cache(store, images.read, autoencoder, text))
    return LatentCache(store)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as in the killed processes: several threads add in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, 20])
def test_a_training_killed_at_random_moments_ends_with_the_same_bits(
    num_kills: int, cache: LatentCache, tmp_path: Path, one_thread: None
) -> None:
    job = {"spec": SPEC, "cache": cache.store.url}
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    run_job({**job, "folder": str(tmp_path / "whole")})
    seconds = time.monotonic() - started
    (tmp_path / "job.json").write_text(json.dumps({**job, "folder": str(tmp_path / "killed")}))
    command = [sys.executable, str(WORKER), str(tmp_path / "job.json"), str(num_kills), str(seconds), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    rounds = sorted((tmp_path / "killed").glob("round-*"))
    assert len(rounds) == int(done.stdout.splitlines()[-1])
    for folder in rounds:
        for name in ("weights-160.safetensors", "state-000000000160/part-00000.safetensors"):
            expected, found = load_file(whole / name), load_file(folder / name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), (folder.name, name)
        assert (folder / "loss.jsonl").read_text().splitlines()[-1] == (whole / "loss.jsonl").read_text().splitlines()[-1]
        assert not list(folder.glob(".state-*"))


def test_a_full_disk_stops_with_one_line_and_preserves_the_last_state(
    cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"spec": {**SPEC, "num_images": 32}, "cache": cache.store.url, "folder": str(tmp_path)}
    run_job(job)
    saved = load_file(tmp_path / "state-000000000032" / "part-00000.safetensors")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_streamed", full)
        with pytest.raises(RunError, match=r"No space left on device.*the last complete state") as caught:
            run_job({**job, "spec": SPEC})
    assert "\n" not in str(caught.value)
    assert newest_state_images(tmp_path) == 32
    again = load_file(tmp_path / "state-000000000032" / "part-00000.safetensors")
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    run_job({**job, "spec": SPEC})
    assert newest_state_images(tmp_path) == 160


def test_a_truncated_shard_is_named_before_the_first_step(cache: LatentCache, tmp_path: Path) -> None:
    shard = Path(cache.store.url) / "latents-00000.safetensors"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RunError, match=r"latents-00000\.safetensors: the shard has .* bytes, the index expects") as caught:
            run_job({"spec": SPEC, "cache": cache.store.url, "folder": str(tmp_path)})
        assert "\n" not in str(caught.value)
        assert newest_state_images(tmp_path) == 0
    finally:
        shard.write_bytes(whole)


RECORDED = (
    *(1.1206449, 1.0750421, 1.0391893, 1.0469389, 0.9920777),
    *(0.9633442, 0.9982046, 0.9531012, 0.9487493, 0.9235252),
)
"""Losses of ten steps, recorded on 2026-11-25 in fp32; in float64 they differ by 7.2e-8, relative, or less."""


def test_ten_losses_equal_the_recorded_ones(cache: LatentCache, tmp_path: Path) -> None:
    """Only a change of the computation changes the losses; the tolerance is for other processors."""
    losses = run_job({"spec": {**SPEC, "seed": 5}, "cache": cache.store.url, "folder": str(tmp_path), "losses": 10})
    assert losses == pytest.approx(RECORDED, rel=1e-4)
