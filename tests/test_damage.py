"""A damaged artefact is noticed when a run first reads it: one line that names the file and the remedy, never another score."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from sqlalchemy import event

from conftest import tiny_study
from finished_study import finished_spec
from isocost.config.data import ScenesSource
from isocost.config.model import TextEncoderSpec
from isocost.data.image_files import list_images
from isocost.data.latent_cache import LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.errors import ConfigError, RunError
from isocost.evaluation import reference_stats
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features, write_features, write_sample_features
from isocost.evaluation.protocol_presets import protocol_preset
from isocost.evaluation.reference_stats import build_statistics, read_statistics
from isocost.experiments.study_assets import StudyAssets
from isocost.models.autoencoder import DiffusersVAE, load_autoencoder
from isocost.models.checkpoint import load_checkpoint
from isocost.models.components import load_pipeline_autoencoder
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.pipeline.merge import archive
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.sample_folder import write_sample_folder
from isocost.sweep.leases import Leases
from isocost.sweep.results_db import ResultsDB
from isocost.utils.artifact_store import MANIFEST, Store, read_manifest
from output_folders import AUTOENCODER, CHECKPOINT, contents, pca_autoencoder, write_checkpoint, write_output_folder
from tiny_configs import Thumbnail, save, scenes

MAKES_AGAIN = "remove .*makes it again"


def flipped(data: bytes) -> bytes:
    """One bit of the last tenth, where the values of tensors are."""
    position = len(data) - len(data) // 10 - 1
    return data[:position] + bytes([data[position] ^ 64]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flipped,
    "half": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "zeroed end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "empty": lambda data: b"",
    "garbled": lambda data: bytes(byte ^ 0xA5 for byte in data),
    "longer": lambda data: data + b"\n{}",
}


def damage(file: Path, name: str) -> None:
    """Replace a file by a damaged one; links to it elsewhere keep the whole one."""
    data = file.read_bytes()
    file.unlink()
    if name != "deleted":
        file.write_bytes(DAMAGES[name](data))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    images = save(folder / "images", scenes(33, 64), [f"{number:03d}" for number in range(33)])
    extractors: Any = {"efficientnet": Thumbnail()}
    build_statistics(str(images), folder / "stats", protocol_preset("mmd-efficientnet-64"), extractors, None)
    return folder / "stats"


def read_reference(folder: Path) -> Any:
    extractors: Any = {"efficientnet": Thumbnail()}
    return read_statistics(folder, extractors)


def write_point(out: Path) -> Path:
    store = Store(out)
    samples = SampleFeatures({"efficientnet": np.ones((5, 8), np.float32)}, np.ones(5))
    with store.create("point", "p", {"num_nonfinite": 0}) as folder:
        write_sample_features(folder, samples)
    return store.folder("point", "p")


# --- files of artefacts -----------------------------------------------------------------------------------------------

WHOLE = {
    "checkpoint": ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler/scheduler_config.json"),
    "autoencoder": ("linear_autoencoder.safetensors",),
    "point": ("efficientnet-00000.safetensors", "by_image.safetensors"),
    "reference": ("efficientnet-00000.safetensors", "images.jsonl"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": load_checkpoint,
    "autoencoder": load_autoencoder,
    "point": lambda folder: read_sample_features(Store(folder.parents[2]).open("point", folder.name), ("efficientnet",)),
    "reference": read_reference,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, statistics: Path) -> dict[str, Path]:
    """A whole artefact of each kind."""
    out = write_output_folder(tmp_path_factory.mktemp("whole") / "out")
    store, point = Store(out), write_point(out)
    checkpoint, autoencoder = store.folder("checkpoint", CHECKPOINT), store.folder("autoencoder", AUTOENCODER)
    return {"checkpoint": checkpoint, "autoencoder": autoencoder, "point": point, "reference": statistics}


def copy_of_whole(whole: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[kind], tmp_path / "artefacts" / kind / "abc"))


@pytest.mark.parametrize("name", [*DAMAGES, "deleted"])
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in WHOLE.items() for file in files])
def test_a_damaged_file_is_named_with_the_remedy(
    kind: str, file: str, name: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of_whole(whole, kind, tmp_path)
    READERS[kind](folder)
    damage(folder / file, name)
    with pytest.raises(RunError, match=f"{Path(file).name}: (missing|damaged).*{MAKES_AGAIN}") as refused:
        READERS[kind](folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [*DAMAGES, "list", "changed", "deep"])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_damaged_manifest_is_named_with_the_remedy(kind: str, name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of_whole(whole, kind, tmp_path)
    manifest = folder / MANIFEST
    if name == "list":
        manifest.write_text("[]")
    elif name == "deep":
        manifest.write_text(manifest.read_text().replace("{", '{"x": ' + "[" * 980 + "]" * 980 + ",", 1))
    elif name == "changed":
        manifest.write_text(manifest.read_text().replace('"created": "2', '"created": "3'))
    else:
        damage(manifest, name)
    with pytest.raises(RunError, match=f"isocost.json: .*{MAKES_AGAIN}") as refused:
        READERS[kind](folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", WHOLE)
def test_artefacts_without_checksums_are_read_and_their_broken_files_named(
    kind: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of_whole(whole, kind, tmp_path)
    plain = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({key: plain[key] for key in plain if not key.endswith("_sha256")}))
    READERS[kind](folder)
    for file in WHOLE[kind]:
        data = (folder / file).read_bytes()
        for name in ("half", "zeroed", "empty"):
            if file == "scheduler/scheduler_config.json":
                continue  # it is only for diffusers
            damage(folder / file, name)
            with pytest.raises((RunError, ConfigError), match=str(folder)) as refused:
                READERS[kind](folder)
            assert "\n" not in str(refused.value)
            (folder / file).write_bytes(data)


def test_a_missing_field_of_a_manifest_is_named(tmp_path: Path) -> None:
    folder = write_point(tmp_path)
    (folder / MANIFEST).write_text('{"kind": "point"}')
    with pytest.raises(RunError, match=f"has no field num_nonfinite, .*{MAKES_AGAIN}"):
        read_manifest(folder)["num_nonfinite"]


def test_a_damaged_artefact_is_not_archived(whole: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole["checkpoint"].parents[2], tmp_path / "out"))
    weights = out / "artefacts" / "checkpoint" / CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors"
    damage(weights, "flipped")
    with pytest.raises(RunError, match=r"diffusion_pytorch_model\.safetensors: damaged"):
        archive(out, tmp_path / "archive")
    assert not list((tmp_path / "archive").glob("artefacts/checkpoint/*"))
    assert not list((tmp_path / "archive").glob("artefacts/.partial/*"))


def test_reference_features_of_a_study_are_verified(tmp_path: Path) -> None:
    extractor: Any = Thumbnail()
    images = scenes(33, 32)
    assets = StudyAssets(tiny_study(), Store(tmp_path))
    features = assets.features(extractor, images)
    (file,) = tmp_path.glob("artefacts/features/*/features.safetensors")
    assert np.array_equal(features, StudyAssets(tiny_study(), Store(tmp_path)).features(extractor, images))
    damage(file, "flipped")
    with pytest.raises(RunError, match=f"{file}: damaged"):
        StudyAssets(tiny_study(), Store(tmp_path)).features(extractor, images)
    shutil.rmtree(file.parent)
    assert np.array_equal(features, StudyAssets(tiny_study(), Store(tmp_path)).features(extractor, images)), "made again"


def test_a_run_with_a_damaged_point_or_autoencoder_stops(family_copy: Path) -> None:
    (family_copy / "results.sqlite").unlink()
    point = next(family_copy.glob("artefacts/point/*/efficientnet*-00000.safetensors"))
    damage(point, "flipped")
    with pytest.raises(RunError, match=f"{point}: damaged.*{MAKES_AGAIN}"):
        Pipeline(finished_spec(), family_copy).run()
    shutil.rmtree(point.parent)
    assert Pipeline(finished_spec(), family_copy).run(), "the remedy helps"


@pytest.mark.parametrize("command", ["sample", "latency", "export"])
def test_commands_on_a_damaged_checkpoint_are_one_line(
    isocost: Any, command: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of_whole(whole, "checkpoint", tmp_path)
    damage(folder / "unet" / "diffusion_pytorch_model.safetensors", "flipped")
    arguments = {
        "sample": ["--prompt", "a", "--out", tmp_path / "new"],
        "latency": ["--out", tmp_path / "new.json"],
        "export": [tmp_path / "new"],
    }
    outcome = isocost(command, folder, *arguments[command])
    assert outcome.status == 1
    assert "diffusion_pytorch_model.safetensors: damaged" in outcome.line
    assert not list(tmp_path.glob("*new*"))


# --- weights of an autoencoder ----------------------------------------------------------------------------------------


def renamed(weights: dict[str, Any], config: dict[str, Any]) -> None:
    weights["decoder.conv_in.wight"] = weights.pop("decoder.conv_in.weight")


def missing(weights: dict[str, Any], config: dict[str, Any]) -> None:
    del weights["decoder.conv_out.bias"]


def another_shape(weights: dict[str, Any], config: dict[str, Any]) -> None:
    weights["decoder.conv_in.bias"] = torch.zeros(3)


def filled_with(value: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(weights: dict[str, Any], config: dict[str, Any]) -> None:
        weights["decoder.conv_in.bias"][0] = value

    return change


def factor(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(weights: dict[str, Any], config: dict[str, Any]) -> None:
        config[name] = value

    return change


REFUSED = {
    "renamed": (renamed, "1 weights are missing"),
    "missing": (missing, "1 weights are missing"),
    "another shape": (another_shape, "."),
    "NaN": (filled_with(float("nan")), r"contain NaN or inf, the first is decoder\.conv_in\.bias"),
    "inf": (filled_with(float("inf")), "contain NaN or inf"),
    "-inf": (filled_with(-float("inf")), "contain NaN or inf"),
    "factor NaN": (factor("scaling_factor", float("nan")), "scaling_factor = nan"),
    "factor inf": (factor("scaling_factor", float("inf")), "scaling_factor = inf"),
    "factor 0": (factor("scaling_factor", 0), "scaling_factor = 0"),
    "factor text": (factor("scaling_factor", "0.18"), r"scaling_factor = 0\.18"),
    "shift NaN": (factor("shift_factor", float("nan")), "shift_factor = nan"),
    "shift list": (factor("shift_factor", [0.1]), "shift_factor"),
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "vae"
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_an_autoencoder_with_wrong_weights_or_factors_is_refused(name: str, vae: Path, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    folder = Path(shutil.copytree(vae, tmp_path / "vae"))
    file, config_file = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    weights, config = load_file(file), json.loads(config_file.read_text())
    change(weights, config)
    save_file(weights, file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config))
    for load in (
        lambda: load_autoencoder(folder),
        lambda: load_autoencoder(tmp_path, "vae"),
        lambda: load_pipeline_autoencoder(tmp_path),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            load()
        assert "\n" not in str(refused.value)
        assert str(folder) in str(refused.value)


def test_pixels_and_latents_that_are_nan_are_an_error_and_never_black(tmp_path: Path) -> None:
    """Finite weights can give NaN too, such as those with a flipped bit of the exponent."""
    small = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    network = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **small)
    autoencoder, latents = DiffusersVAE(network), torch.ones(3, 4, 4, 4)
    assert autoencoder.decode(latents).shape == (3, 3, 4, 4)
    latents[1] = float("nan")
    for part in (network.decoder, network.encoder):
        with torch.no_grad():
            part.conv_in.weight.fill_(3e38)
    assert all(bool(weight.isfinite().all()) for weight in network.parameters())
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    pca = pca_autoencoder()
    with pytest.raises(RunError, match="NaN or inf for 1 of 3 images that are decoded"):
        pca.decode(latents)
    pca.scale[0] = 1e-45
    for call in (
        lambda: autoencoder.decode(torch.ones(2, 4, 4, 4)),
        lambda: autoencoder.encode(images),
        lambda: pca.encode(images),
    ):
        with pytest.raises(RunError, match="the autoencoder gives NaN or inf for 2 of 2 images") as stopped:
            call()
        assert "\n" not in str(stopped.value)


def test_every_part_of_a_checkpoint_refuses_nan(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of_whole(whole, "checkpoint", tmp_path)
    (folder / MANIFEST).write_text(
        json.dumps({key: value for key, value in read_manifest(folder).items() if not key.endswith("_sha256")})
    )
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"contain NaN or inf, the first is conv_in\.bias"):
        load_checkpoint(folder)
    pca = pca_autoencoder()
    pca.scale[0] = float("nan")
    pca.save(tmp_path)
    with pytest.raises(ConfigError, match="contain NaN or inf, the first is scale"):
        load_autoencoder(tmp_path)


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    images = load_images(ScenesSource(kind="scenes", num_images=8), 32, 0)
    text_encoder = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    write_index(ShardStore(folder), write_cache(ShardStore(folder), images.read, pca_autoencoder(), text_encoder))
    return folder


def read_everything(folder: Path) -> None:
    cache = LatentCache(folder)
    cache.moments(torch.arange(8))
    numbers = cache.captions(torch.arange(8))
    cache.prompt_embeds(torch.cat([numbers[:, 0], torch.tensor([cache.null_caption])]))


@pytest.mark.parametrize("name", [*DAMAGES, "deleted"])
@pytest.mark.parametrize("file", ["latents-00000", "captions-00000", "text-00000", "isocost"])
def test_a_damaged_latent_cache_is_one_line(file: str, name: str, cache: Path, tmp_path: Path) -> None:
    if (file, name) in {("isocost", "deleted"), ("isocost", "longer")}:
        pytest.skip("without an index there is no cache, and the next run writes it")
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    (path,) = (found for found in folder.glob(f"{file}.*") if found.suffix == ".safetensors" or file == "isocost")
    read_everything(folder)
    damage(path, name)
    if (file, name) == ("isocost", "flipped"):
        return  # its last tenth is the provenance, which nobody computes with
    with pytest.raises(RunError, match=f"{path.name}.*remove") as refused:
        read_everything(folder)
    assert "\n" not in str(refused.value)


def replaced(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("latents-00000.safetensors", b'"mean"', b'"mfan"'),
        ("latents-00000.safetensors", b"F16", b"I16"),
        ("text-00000.safetensors", b'"prompt_embeds"', b'"prompt_embedz"'),
        ("isocost.json", b'"shard_size": ', b'"shard_size": -'),
        ("isocost.json", b'"shard_size": ', b'"shard_size": 0.'),
        ("isocost.json", b'"num_captions": ', b'"num_captions": 9'),
        ("isocost.json", b'"num_captions"', b'"num_images": 1, "num_captions"'),
        ("isocost.json", b'"num_images": ', b'"num_images": 1e'),
        ("isocost.json", b'"token_statistics": {', b'"token_statistics": {"x": 1,'),
        ("isocost.json", b'"with_prompt_embeds": true', b'"with_prompt_embeds": "a"'),
    ],
)
def test_a_latent_cache_with_another_header_or_index_is_one_line(
    file: str, old: bytes, new: bytes, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    replaced(folder / file, old, new)
    with pytest.raises(RunError, match=r"isocost\.json.*the same command writes") as refused:
        read_everything(folder)
    assert "\n" not in str(refused.value)


# --- reference statistics ---------------------------------------------------------------------------------------------


class Interrupted(Thumbnail):
    """An extractor that breaks off after some images."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def test_a_reference_that_broke_off_leaves_nothing_for_the_next_one(tmp_path: Path) -> None:
    preset = protocol_preset("mmd-efficientnet-64")
    large = save(tmp_path / "large", scenes(80, 64), [f"{number:03d}" for number in range(80)])
    small = save(tmp_path / "small", scenes(40, 64, seed=1), [f"{number:03d}" for number in range(40)])
    out, again = tmp_path / "stats", tmp_path / "fresh"
    extractors: Any = {"efficientnet": Thumbnail()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    for broken in ("features", "publish"):
        with pytest.MonkeyPatch.context() as patch:
            if broken == "publish":
                patch.setattr(reference_stats, "publish", full)
            interrupted: Any = {"efficientnet": Interrupted()}
            with pytest.raises((OSError, KeyboardInterrupt)):
                build_statistics(str(large), out, preset, extractors if broken == "publish" else interrupted, None)
        assert {path.name for path in tmp_path.iterdir()} == {"large", "small"}
    old = tmp_path / ".stats.partial"  # as 0.1 left it
    shutil.copytree(large, old)
    save_file({"features": torch.zeros(80, 48)}, old / "efficientnet-00001.safetensors")
    build_statistics(str(small), out, preset, extractors, None)
    build_statistics(str(small), again, preset, extractors, None)
    first, second = read_reference(out), read_reference(again)
    assert first.ids == second.ids
    assert np.array_equal(first.features["efficientnet"], second.features["efficientnet"])
    assert len(first.features["efficientnet"]) == 40


def test_of_two_attempts_at_once_one_wins_whole(tmp_path: Path) -> None:
    preset, out = protocol_preset("mmd-efficientnet-64"), tmp_path / "stats"
    sources = [
        save(tmp_path / str(seed), scenes(33 + seed, 64, seed=seed), [f"{n:03d}" for n in range(33 + seed)]) for seed in (0, 1)
    ]
    extractors: Any = {"efficientnet": Thumbnail()}

    class Slow(Thumbnail):
        """While its images are read, another process makes the same folder."""

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if not out.exists():
                build_statistics(str(sources[1]), out, preset, extractors, None)
            return super().__call__(images)

    slow: Any = {"efficientnet": Slow()}
    with pytest.raises(RunError, match="another process has written it in the meantime"):
        build_statistics(str(sources[0]), out, preset, slow, None)
    assert len(read_reference(out)) == 34
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "stats"}


def test_features_are_held_against_the_images_before_they_are_published(tmp_path: Path) -> None:
    class Short(Thumbnail):
        """An extractor that loses the last row of a batch."""

    preset, out = protocol_preset("mmd-efficientnet-64"), tmp_path / "stats"
    images = save(tmp_path / "images", scenes(33, 64), [f"{number:03d}" for number in range(33)])

    def write_one_more(folder: Path, features: dict[str, np.ndarray]) -> None:
        write_features(folder, {name: np.concatenate([matrix, matrix[:1]]) for name, matrix in features.items()})

    extractors: Any = {"efficientnet": Short()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_stats, "write_features", write_one_more)
        with pytest.raises(RunError, match="34 rows of efficientnet features for 33 images"):
            build_statistics(str(images), out, preset, extractors, None)
    assert not out.exists()


# --- sample and score -------------------------------------------------------------------------------------------------


def test_samples_are_alone_in_their_folder(isocost: Any, tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(Store(tmp_path / "store"), autoencoder="scenes"), tmp_path / "samples"
    arguments = ["sample", checkpoint, "--steps", "1", "--out", out, "--prompt", "a red ring"]
    answer = isocost(*arguments, "--num-images", "3").answer
    assert [file.name for file in list_images(out)] == ["00-00.png", "00-01.png", "00-02.png"]
    assert sorted(answer["files"]) == [str(file) for file in list_images(out)]
    assert Path(answer["sheet"]) == tmp_path / "samples-sheet.png"
    before = contents(tmp_path)
    refused = isocost(*arguments, "--num-images", "1")
    assert refused.status == 2
    assert "holds 3 images of an earlier call" in refused.line
    assert "--overwrite" in refused.line
    assert contents(tmp_path) == before
    assert isocost(*arguments, "--num-images", "1", "--overwrite").status == 0
    assert [file.name for file in list_images(out)] == ["00-00.png"]
    (out / "photo.png").write_bytes(b"mine")
    for more in ([], ["--overwrite"]):
        refused = isocost(*arguments, *more)
        assert refused.status == 2
        assert "holds other files, such as photo.png" in refused.line


def test_a_full_disk_leaves_earlier_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "samples"
    write_sample_folder(out, np.zeros((1, 3, 8, 8, 3), np.uint8))
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", full)
        with pytest.raises(OSError, match="No space"):
            write_sample_folder(out, np.ones((1, 2, 8, 8, 3), np.uint8))
    assert contents(tmp_path) == before
    write_sample_folder(out, np.ones((1, 2, 8, 8, 3), np.uint8))
    assert len(list_images(out)) == 2


# --- the results database and leases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        ("database or disk is full", "free some disk space"),
        ("attempt to write a readonly database", "make it writable"),
        ("disk I/O error", "check the disk"),
        ("database disk image is malformed", "restore the database"),
    ],
)
@pytest.mark.parametrize("operation", ["write", "read", "merge"])
def test_a_database_that_cannot_go_on_is_one_line_at_once(operation: str, problem: str, remedy: str, tmp_path: Path) -> None:
    results_db, other = ResultsDB(tmp_path / "results.sqlite"), ResultsDB(tmp_path / "other.sqlite")

    def failing(*_: Any) -> None:
        raise sqlite3.OperationalError(problem)

    event.listen(results_db.engine, "before_cursor_execute", failing)
    operations: dict[str, Callable[[], Any]] = {
        "write": lambda: results_db.set_events("data.train", [("1.png", "broken")]),
        "read": results_db.table,
        "merge": lambda: other.import_from(results_db),
    }
    with pytest.raises(RunError, match=f"{problem}; finished work is kept: {remedy}") as refused:
        operations[operation]()
    assert "sqlalche" not in str(refused.value)
    assert "\n" not in str(refused.value)
    event.remove(results_db.engine, "before_cursor_execute", failing)
    operations[operation]()


@pytest.mark.parametrize("name", ["half", "zeroed end", "garbled"])
def test_a_damaged_database_is_one_line(isocost: Any, name: str, tmp_path: Path) -> None:
    out = write_output_folder(tmp_path / "out")
    damage(out / "results.sqlite", name)
    outcome = isocost("archive", out, tmp_path / "archive")
    assert outcome.status in (1, 2)
    assert "Traceback" not in outcome.err
    assert "results.sqlite" in outcome.line
    assert "sqlalche" not in outcome.err


@pytest.mark.parametrize("heartbeat", ["abc", "2026-11-30T00:00:00", "", "nan", b"\x00"])
def test_a_lease_with_a_heartbeat_that_is_no_number_is_free(heartbeat: Any, tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    with sqlite3.connect(tmp_path / "results.sqlite") as plain:
        plain.execute("INSERT INTO leases VALUES ('train a', 'x', 'elsewhere', 1, ?)", (heartbeat,))
    leases = Leases(results_db.engine)
    assert leases.acquire("train a")
    leases.close()
