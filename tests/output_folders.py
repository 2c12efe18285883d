"""Small output folders, made without a training, for tests of archives, merging and damaged files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from conftest import tiny_study
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.study_yaml import dump_study
from isocost.evaluation.confidence_intervals import Interval
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.checkpoint import CheckpointInfo, save_networks
from isocost.models.unet import build_unet
from isocost.sweep.results_db import ResultsDB
from isocost.utils.artifact_store import Store

MODEL = ModelSpec(width=8, latent_channels=4, latent_size=8, cross_attention_dim=384, layers_per_block=1, num_levels=2)
NOBODY = 65534
AUTOENCODER, CHECKPOINT, STATE = "0123456789abcdef", "fedcba9876543210", "state-000000000032"


def pca_autoencoder(channels: int = 4) -> PCAAutoencoder:
    """A PCA autoencoder of 4 x 4 patches, of noise."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(48, channels, generator=generator)).Q.T.contiguous()
    return PCAAutoencoder(torch.zeros(48), basis, torch.full((channels,), 0.5), 4)


def write_checkpoint(store: Store, name: str = CHECKPOINT, autoencoder: str = f"../../autoencoder/{AUTOENCODER}") -> Path:
    """Write a checkpoint of random weights."""
    torch.manual_seed(0)
    facts = {"size": "0.8M", "num_parameters": 1, "images_seen": 32, "gflop_per_forward": 1.0, "normalized_cost_per_step": 1.0}
    info = CheckpointInfo(
        model=MODEL,
        prediction_type="epsilon",
        autoencoder=autoencoder,
        text_encoder=TextEncoderSpec(path="minilm", max_tokens=8),
        resolution=32,
        **facts,
    )
    with store.create("checkpoint", name, {"info": info.model_dump(mode="json")}) as folder:
        save_networks(folder, build_unet(MODEL), "epsilon")
    return store.folder("checkpoint", name)


def write_output_folder(out: Path) -> Path:
    """Write the output folder of a study with an autoencoder, a checkpoint, a training state and one event."""
    store = Store(out)
    with store.create("autoencoder", AUTOENCODER, {}) as folder:
        pca_autoencoder().save(folder)
    write_checkpoint(store)
    state = store.folder("run", "0" * 16) / STATE
    state.mkdir(parents=True)
    (state / "part-00000.json").write_text("{}")
    (out / "study.yaml").write_text(dump_study(tiny_study()))
    with ResultsDB(out / "results.sqlite") as results_db:
        results_db.set_events("data.train", [("1.png", "broken")])
    return out


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every path below a folder, with the bytes of files and the targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = kind
    return found


def one_score() -> dict[str, Interval]:
    return {"mmd_efficientnet": Interval(0.5, 0.4, 0.6)}


@contextmanager
def plain_user() -> Iterator[Path]:
    """A new folder that belongs to a user without privileges, who runs the block if the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder, is_root = Path(name), os.geteuid() == 0
        if is_root:
            os.chown(folder, NOBODY, NOBODY)
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can write into the folder, not even root: root gives up its privileges for the block."""
    paths, is_root = [folder, *folder.rglob("*")], os.geteuid() == 0
    for path in paths:
        if is_root:
            os.chown(path, NOBODY, NOBODY)
        path.chmod(0o555 if path.is_dir() else 0o444)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
