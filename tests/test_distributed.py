"""Distributed training has the images, gradients and weights of one process, also if it resumes with another number of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isocost.config.data import ScenesSource
from isocost.config.model import TextEncoderSpec
from isocost.data.latent_cache import LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.errors import ConfigError
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.text_encoder import MiniLMTextEncoder
from train_worker import run_job

WORKER = Path(__file__).with_name("train_worker.py")
SPEC = {
    "num_images": 64,
    "batch_size": 16,
    "microbatch": 8,
    "lr": 1e-3,
    "state_every_images": 32,
    "ema_half_life_images": [64, 128],
}
FSDP = {**SPEC, "sharding": "fsdp"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    store = ShardStore(tmp_path_factory.mktemp("cache"))
    images = load_images(ScenesSource(kind="scenes", num_images=48), 32, 0)
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    write_index(store, write_cache(store, images.read, PCAAutoencoder.fit(images.images, 4, 4), text))
    return LatentCache(store)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(num_processes: int, jobs: list[dict[str, Any]], folder: Path, timeout: float = 300) -> None:
    """Run jobs in a group of processes that communicate over loopback."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port()}", str(WORKER), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def runs(cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of trainings by name: `one-*` in this process, `two-*` replicated over two, `shards-*` sharded over two."""
    root = tmp_path_factory.mktemp("runs")

    def job(name: str, spec: dict[str, Any], **more: Any) -> dict[str, Any]:
        (root / name).mkdir(exist_ok=True)
        return {"spec": spec, "folder": str(root / name), "cache": cache.store.url, **more}

    first_half = {"num_images": 32}
    ten_steps = {"num_images": 160, "state_every_images": 1000}
    run_job(job("one-gradients", SPEC, gradients=True))
    run_job(job("one-double", {**SPEC, **ten_steps}, double=True))
    run_job(job("one-to-two", {**SPEC, **first_half}))
    run_job(job("one-to-shards", {**SPEC, **first_half}))
    distributed_jobs = [
        job("two-gradients", SPEC, gradients=True),
        job("two-double", {**SPEC, **ten_steps}, double=True),
        job("two", SPEC),
        job("two-resumed", {**SPEC, **first_half}),
        job("two-resumed", SPEC),
        job("shards-gradients", FSDP, gradients=True),
        job("shards-double", {**FSDP, **ten_steps}, double=True),
        job("shards", FSDP),
        job("shards-resumed", {**FSDP, **first_half}),
        job("shards-resumed", FSDP),
        job("shards-to-one", {**FSDP, **first_half}),
        job("one-to-two", SPEC),
        job("one-to-shards", FSDP),
    ]
    launch(2, distributed_jobs, root)
    run_job(job("shards-to-one", SPEC))
    run_job(job("one", SPEC))
    return root


def weights(folder: Path, snapshot: int = 64) -> dict[str, Tensor]:
    return load_file(folder / f"weights-{snapshot}.safetensors")


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the last training state, concatenated from its parts."""
    parts = [load_file(file) for file in sorted(folder.glob("state-*64/part-*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) if parts[0][name].ndim else parts[0][name] for name in parts[0]}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def seen(folder: Path, images: int, num_processes: int) -> list[int]:
    files = [folder / f"seen-{rank}-{images}.json" for rank in range(num_processes)]
    return sorted(image for file in files for image in json.loads(file.read_text()))


def losses(folder: Path) -> list[str]:
    return (folder / "loss.jsonl").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two", "shards"])
def test_two_steps_and_two_resumed_steps_give_the_bits_of_four_steps(runs: Path, kind: str) -> None:
    assert difference(state(runs / kind), state(runs / f"{kind}-resumed")) == 0
    assert difference(weights(runs / kind), weights(runs / f"{kind}-resumed")) == 0
    assert losses(runs / kind) == losses(runs / f"{kind}-resumed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two", "shards"])
def test_first_gradients_and_loss_equal_those_of_one_process(runs: Path, kind: str) -> None:
    single, distributed = (load_file(runs / f"{name}-gradients" / "gradients.safetensors") for name in ("one", kind))
    assert difference(single, distributed) < 1e-6
    assert max(float(grad.abs().max()) for grad in single.values()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two", "shards"])
def test_ten_steps_in_float64_equal_those_of_one_process(runs: Path, kind: str) -> None:
    assert difference(weights(runs / "one-double", 160), weights(runs / f"{kind}-double", 160)) < 1e-6


@pytest.mark.slow
def test_a_sharded_training_equals_a_replicated_one_and_each_process_has_half_of_the_state(runs: Path) -> None:
    assert difference(weights(runs / "two-double", 160), weights(runs / "shards-double", 160)) < 1e-6
    for first, second in zip(losses(runs / "two"), losses(runs / "shards"), strict=True):
        assert json.loads(first)["loss"] == pytest.approx(json.loads(second)["loss"], abs=1e-5)
    parts = sorted((runs / "shards").glob("state-*64/part-*.safetensors"))
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) == 2
    assert max(sizes) < 0.6 * sum(sizes)
    assert {name.split(".")[1] for name in state(runs / "two") if name.startswith("ema.")} == {"64", "128"}


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "after"), [("one-to-two", 2), ("one-to-shards", 2), ("shards-to-one", 1)])
def test_another_number_of_processes_resumes_with_exactly_the_next_images(runs: Path, folder: str, after: int) -> None:
    assert seen(runs / folder, 32, 3 - after) == list(range(32))
    assert seen(runs / folder, 64, after) == list(range(32, 64))
    last_losses = [json.loads(losses(runs / name)[-1])["loss"] for name in (folder, "one")]
    assert last_losses[0] == pytest.approx(last_losses[1], abs=1e-5)


def test_a_batch_size_that_is_not_divisible_by_the_processes_is_refused() -> None:
    from types import SimpleNamespace

    from isocost.config.training import TrainSpec
    from isocost.training.distributed import process_rows

    accelerator = SimpleNamespace(num_processes=3, process_index=1)
    assert list(process_rows(TrainSpec(num_images=9, batch_size=9), accelerator)) == [3, 4, 5]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"batch_size=16 is not divisible by 3 processes: take 15 or 18"):
        process_rows(TrainSpec(num_images=16, batch_size=16), accelerator)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "limit"), [(96, None), (768, 0.10)])
def test_a_large_network_trains_sharded_and_takes_the_estimated_memory(width: int, limit: float | None, tmp_path: Path) -> None:
    """Size 5B with two levels instead of four: 453M parameters. At width 96 PyTorch itself takes more memory."""
    model = {"width": width, "latent_size": 8, "num_levels": 2, "layers_per_block": 1}
    spec = {**FSDP, "batch_size": 4, "microbatch": 2, "ema_half_life_images": 64, "gradient_checkpointing": True}
    launch(2, [{"spec": spec, "folder": str(tmp_path), "memory": model}], tmp_path, timeout=600)
    for rank in range(2):
        report = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        assert all(0 < loss < 10 for loss in report["losses"])
        assert report["shard_parameters"] == pytest.approx(report["parameters"] / 2, rel=0.01)
        if limit is not None:
            assert report["measured"] == pytest.approx(report["estimated"], rel=limit)
