"""Memory: settings of the autoencoder, offloading, calls divided when memory runs out, and forecasts by counting."""

from __future__ import annotations

import gc
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn

import isocost
import isocost.sampling.sample as sampling
import tiny_pipelines
from conftest import plain_study
from isocost.config.data import ScenesSource
from isocost.config.model import TextEncoderSpec
from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.study import StudySpec
from isocost.config.sweep import PointSpec
from isocost.data.latent_cache import load_images, write_cache
from isocost.data.row_store import ShardStore
from isocost.errors import ConfigError, RunError
from isocost.estimate import memory_forecast
from isocost.estimate.component_shapes import KNOWN_AUTOENCODERS
from isocost.estimate.memory_forecast import forecast_batches, forecast_sweep
from isocost.evaluation.confidence_intervals import Interval
from isocost.models.autoencoder import DiffusersVAE, PCAAutoencoder, load_autoencoder, to_uint8
from isocost.models.checkpoint import pretrained_info
from isocost.models.decoder_memory import decoder_bytes
from isocost.models.memory import activation_bytes
from isocost.models.pretrained.files import load_module
from isocost.models.pretrained.prompt_encoder import PipelineTextEncoder
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sweep.results_db import ResultsDB
from isocost.utils.device import HostMonitor
from test_results_db import row

SIDE, TILE_SIZE = 128, 64
WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS: dict[str, Any] = {"num_steps": 1, "guidance": 3.0, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion for images of 128 x 128 pixels, with an autoencoder of factor 2."""
    pipeline = tiny_pipelines.stable_diffusion(unet_changes={"sample_size": SIDE // 2})
    return tiny_pipelines.written(pipeline, tmp_path_factory.mktemp("pipeline") / "base")


def images_of(folder: Path, num_images: int = 2, **options: Any) -> np.ndarray:
    model = isocost.load_checkpoint(folder, device="cpu", **options)
    return model.sample(tiny_pipelines.PROMPTS, num_images=num_images, **SETTINGS).array


# --- settings of the autoencoder ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiles_slices_and_dtype_are_those_of_diffusers(folder: Path) -> None:
    latents = torch.randn(3, 4, SIDE // 2, SIDE // 2)
    network = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).eval()
    network.decoder.to(memory_format=torch.channels_last)
    scaled = latents / network.config.scaling_factor
    whole = load_autoencoder(folder / "vae").decode(latents)
    with torch.inference_mode():
        network.tile_sample_min_size, network.tile_latent_min_size = TILE_SIZE, TILE_SIZE // 2
        network.enable_tiling()
        tiled = torch.cat([to_uint8(network.decode(latent).sample) for latent in scaled.split(1)])
        network.disable_tiling()
        half = network.to(torch.bfloat16)
        in_bf16 = torch.cat([to_uint8(half.decode(latent.bfloat16()).sample.float()) for latent in scaled.split(1)])
    assert torch.equal(load_autoencoder(folder / "vae", vae=VaeSpec(tile_size=TILE_SIZE)).decode(latents), tiled)
    assert torch.equal(load_autoencoder(folder / "vae", vae=VaeSpec(dtype="bf16")).decode(latents), in_bf16)
    assert not torch.equal(tiled, whole)
    assert not torch.equal(in_bf16, whole)
    assert (tiled.float() - whole.float()).abs().mean() < 30
    assert (in_bf16.float() - whole.float()).abs().max() < 30


def test_slices_are_single_images(folder: Path) -> None:
    latents = torch.randn(4, 4, 8, 8)  # images of 16 pixels share a call
    sliced = load_autoencoder(folder / "vae", vae=VaeSpec(slicing=True))
    calls: list[int] = []
    sliced.network.decoder.register_forward_hook(lambda _, arguments, __: calls.append(len(arguments[0])))
    images = sliced.decode(latents)
    assert calls == [1, 1, 1, 1]
    whole = load_autoencoder(folder / "vae")
    assert torch.equal(images, torch.cat([whole.decode(latent) for latent in latents.split(1)]))


@pytest.mark.slow
def test_sample_takes_the_settings(folder: Path, tmp_path: Path, isocost: Any) -> None:
    whole = images_of(folder)
    for options in ({"vae_dtype": torch.bfloat16}, {"vae_tile_size": TILE_SIZE}):
        changed = images_of(folder, **options)
        assert changed.shape == whole.shape
        assert not np.array_equal(changed, whole)
    assert np.array_equal(images_of(folder, vae_slicing=True), whole)  # images of 128 pixels are decoded one at a time
    out = tmp_path / "images"
    command = ("sample", folder, "--prompt", "a ring", "--steps", 1, "--num-images", 1, "--out", out)
    outcome = isocost(*command, "--vae-dtype", "bf16", "--vae-tile-size", TILE_SIZE, "--vae-slicing", "--offload")
    assert outcome.status == 0
    assert len(outcome.answer["files"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vae-tile-size", "128"), "= 128: the images have 128 x 128 pixels, so there is one tile; give a smaller size"),
        (("--vae-tile-size", "100"), "tile_size = 100"),
        (("--vae-tile-size", "0"), "tile_size = 0"),
        (("--offload", "--compile"), "leave out one of both"),
    ],
)
def test_a_setting_without_effect_is_refused(
    folder: Path, tmp_path: Path, isocost: Any, options: tuple[str, ...], message: str
) -> None:
    outcome = isocost("sample", folder, "--prompt", "a ring", "--out", tmp_path / "out", *options)
    assert outcome.status == 2
    assert message in outcome.line
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_without_the_setting_is_refused(tmp_path: Path) -> None:
    grid = {"num_steps": [1], "guidance": [1]}
    with pytest.raises(ConfigError, match=r"sweep\.vae: a PCA autoencoder has no vae dtype, tiling or slicing; leave them out"):
        StudySpec.from_dict(plain_study(sweep={**grid, "vae": {"dtype": "bf16"}}))
    autoencoder = {"kind": "pretrained", "path": "scenes"}
    with pytest.raises(ConfigError, match=r"sweep\.vae\.tile_size = 64: the images have 32 x 32 pixels"):
        StudySpec.from_dict(plain_study(autoencoder=autoencoder, sweep={**grid, "vae": {"tile_size": 64}}))
    with pytest.raises(ConfigError, match=r"sweep\.vae\.tile_size = 96"):
        StudySpec.from_dict(plain_study(autoencoder=autoencoder, sweep={**grid, "vae": {"tile_size": 96}}))
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    PCAAutoencoder.fit(images, 4, 4).save(tmp_path)
    with pytest.raises(ConfigError, match="a PCA autoencoder has no vae dtype"):
        load_autoencoder(tmp_path, vae=VaeSpec(slicing=True))
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(ConfigError, match="2 pixels per latent position"):
        DiffusersVAE(tiny, vae=VaeSpec(tile_size=64))


def test_settings_change_the_digest_and_defaults_do_not() -> None:
    fields = {"checkpoint": "c", "solver": SolverSpec(), "num_steps": 4, "guidance": 2.0, "num_images": 100}
    assert PointSpec(**fields).canonical() == {
        "checkpoint": "c",
        "solver": {},
        "num_steps": 4,
        "guidance": 2.0,
        "num_images": 100,
    }
    assert PointSpec(**fields, vae=VaeSpec()).canonical() == PointSpec(**fields).canonical()
    assert PointSpec(**fields, vae=VaeSpec(dtype="bf16")).canonical()["vae"] == {"dtype": "bf16"}


@pytest.mark.slow
def test_a_sweep_decodes_with_the_settings(folder: Path, tmp_path: Path) -> None:
    plain = {
        "name": "vae",
        "data": {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64, "seed": 1}},
        "checkpoints": [str(folder)],
        "sweep": {
            "num_steps": [1],
            "guidance": [1],
            "solvers": [{"name": "euler"}],
            "batch_size": 16,
            "vae": {"dtype": "bf16", "tile_size": TILE_SIZE, "slicing": True},
        },
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
    }
    result = isocost.run(isocost.Study.from_dict(plain), tmp_path / "out", device="cpu", figure_formats=())
    (point,) = result.results.to_dict("records")
    assert (point["vae_dtype"], point["vae_tile_size"], bool(point["vae_slicing"])) == ("bf16", TILE_SIZE, True)
    command = result.recommend(nfe=4).command
    assert "--vae-dtype bf16 --vae-tile-size 64 --vae-slicing" in command
    too_large = plain | {"sweep": plain["sweep"] | {"vae": {"tile_size": SIDE}}}
    with pytest.raises(ConfigError, match=r"base: sweep\.vae\.tile_size = 128: the images have 128 x 128 pixels"):
        isocost.run(isocost.Study.from_dict(too_large), tmp_path / "other", device="cpu")


def test_a_database_without_settings_gets_them_when_a_point_has_them(tmp_path: Path) -> None:
    scores = {"mmd_efficientnet": Interval(0.5, 0.4, 0.6)}
    file = tmp_path / "results.sqlite"
    with ResultsDB(file) as database:
        database.add_point(row("a"), scores, {}, {})
        assert "vae_dtype" not in database.table().columns
    connection = sqlite3.connect(file)
    connection.execute("DROP TABLE vae_settings")
    connection.close()
    settings = {"vae_dtype": "bf16", "vae_tile_size": None, "vae_slicing": False}
    with ResultsDB(file) as database:
        assert list(database.table()["point"]) == ["a"]
        database.add_point(row("b", num_steps=8), scores, {}, {}, settings)
        database.add_point(row("b", num_steps=8), scores, {}, {}, settings)
        with ResultsDB(tmp_path / "merged.sqlite") as merged:
            assert merged.import_from(database) == 2
            table = merged.table().set_index("point")
    assert table["vae_dtype"].isna().to_dict() == {"a": True, "b": False}


# --- offloading -----------------------------------------------------------------------------------------------------------


def num_alive(kinds: tuple[type, ...]) -> int:
    gc.collect()
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


@pytest.mark.slow
def test_offloading_changes_no_image_and_holds_one_part_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = images_of(folder)
    parts = (PipelineTextEncoder, Denoiser, DiffusersVAE)
    held: list[tuple[str, int]] = []
    before = num_alive(parts)

    def spy_on(name: str) -> None:
        load = getattr(sampling, name)

        def spy(*arguments: Any, **options: Any) -> Any:
            held.append((name, num_alive(parts) - before))
            return load(*arguments, **options)

        monkeypatch.setattr(sampling, name, spy)

    names = ("load_checkpoint_text_encoder", "Denoiser", "load_checkpoint_autoencoder")
    for name in names:
        spy_on(name)
    model = isocost.load_checkpoint(folder, device="cpu", offload=True)
    for _ in range(2):
        assert np.array_equal(model.sample(tiny_pipelines.PROMPTS, num_images=2, **SETTINGS).array, expected)
    assert held == 2 * [(name, 0) for name in names]
    assert num_alive(parts) == before


# --- memory runs out ------------------------------------------------------------------------------------------------------


def test_encoding_and_decoding_are_divided_with_a_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = load_autoencoder(folder / "vae")
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    expected, _ = autoencoder.encode(images)
    decoded = autoencoder.decode(expected)

    def limited(function: Any, limit: int) -> Any:
        def call(batch: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if len(batch) > limit:
                raise torch.OutOfMemoryError("out of memory")
            return function(batch, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("encode", "decode"):
            patch.setattr(autoencoder.network, name, limited(getattr(autoencoder.network, name), 3))
        assert torch.allclose(autoencoder.encode(images)[0], expected, atol=1e-5)
        assert (autoencoder.decode(expected).int() - decoded.int()).abs().max() <= 1
        assert [text.partition(";")[0] for text in autoencoder.fallbacks] == [
            "out of memory: 8 images are encoded in calls of 4",
            "out of memory: 4 images are encoded in calls of 2",
            "out of memory: 8 images are decoded in calls of 4",
            "out of memory: 4 images are decoded in calls of 2",
        ]
    monkeypatch.setattr(autoencoder.network, "encode", limited(autoencoder.network.encode, 0))
    with pytest.raises(RunError, match="encoding one image of 16 x 16 pixels does not fit into memory"):
        autoencoder.encode(images)


def test_a_latent_cache_records_divided_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = load_autoencoder("scenes")
    assert isinstance(autoencoder, DiffusersVAE)
    images = load_images(ScenesSource(kind="scenes", num_images=4), 32, 0)
    text_encoder = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    encode = autoencoder.network.encode

    def limited(batch: torch.Tensor) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return encode(batch)

    for limit, fallbacks in (("none", None), ("two", ["out of memory: 4 images are encoded in calls of 2"])):
        write_cache(ShardStore(tmp_path / limit), images.read, autoencoder, text_encoder)
        info = json.loads((tmp_path / limit / "latents-00000.json").read_text())
        found = info.get("fallbacks")
        assert (found and [text.partition(";")[0] for text in found]) == fallbacks
        monkeypatch.setattr(autoencoder.network, "encode", limited)


# --- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_nan_is_found_in_any_weight_and_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_pipelines.autoencoder().save_pretrained(tmp_path, safe_serialization=True)
    weights = {name: weight.to(dtype) for name, weight in load_file(tmp_path / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    load_autoencoder(tmp_path)
    for name, value in (("encoder.conv_in.weight", torch.nan), ("decoder.conv_out.bias", -torch.inf)):
        bad = {key: weight.clone() for key, weight in weights.items()}
        bad[name].view(-1)[-1] = value
        save_file(bad, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(ConfigError, match=rf"1 of {len(weights)} weights contain NaN or inf, the first is {name}"):
            load_autoencoder(tmp_path)
    save_file({**weights, "not.of.the.network": torch.full((2,), torch.nan)}, tmp_path / WEIGHTS, {"format": "pt"})
    load_autoencoder(tmp_path)


def test_the_check_of_the_weights_takes_no_memory(tmp_path: Path) -> None:
    monitor = HostMonitor()
    if monitor.memory_kind is None:
        pytest.skip("this system does not report the resident memory")
    widths = {"block_out_channels": (256, 256), "norm_num_groups": 8, "layers_per_block": 2}
    tiny_pipelines.autoencoder(**widths).save_pretrained(tmp_path, safe_serialization=True)
    size = (tmp_path / WEIGHTS).stat().st_size
    load_module(AutoencoderKL, tmp_path)  # loads the libraries
    gc.collect()
    before = monitor.memory_bytes()
    network = load_module(AutoencoderKL, tmp_path)
    after = monitor.memory_bytes()
    assert before is not None
    assert after is not None
    assert network is not None
    assert size > 50e6
    assert after - before < size / 2


# --- forecasts ------------------------------------------------------------------------------------------------------------


def test_live_tensors_are_counted() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 10))
        inputs = torch.empty(7, 10)
    wide = 7 * 1000 * 4
    assert activation_bytes(network, network, inputs) == 2 * wide  # the input and the output of the ReLU
    inplace = nn.Sequential(network[0], nn.ReLU(inplace=True), network[2])
    assert activation_bytes(inplace, inplace, inputs) == wide + 7 * 10 * 4
    attention = torch.nn.functional.scaled_dot_product_attention
    query = torch.empty(1, 1, 4096, 8, device="meta")
    assert activation_bytes(network, lambda q: attention(q, q, q), query) == query.nbytes  # no matrix of 4096 x 4096


@pytest.mark.slow
def test_a_decoder_takes_memory_by_pixels_dtype_and_tile(folder: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text())
    whole = decoder_bytes(config, 256)
    assert decoder_bytes(config, 512) == pytest.approx(4 * whole, rel=0.05)
    assert decoder_bytes(config, 256, 3) == pytest.approx(3 * whole, rel=0.05)
    assert decoder_bytes(config, 256, 1, VaeSpec(dtype="bf16")) == pytest.approx(whole / 2, rel=0.05)
    assert decoder_bytes(config, 256, 1, VaeSpec(tile_size=64)) < whole / 3


PIPELINES = {
    "sd": (tiny_pipelines.stable_diffusion, "unet"),
    "sdxl": (tiny_pipelines.sdxl, "unet"),
    "pixart": (tiny_pipelines.pixart, "transformer"),
    "sd3": (tiny_pipelines.sd3, "transformer"),
    "flux": (tiny_pipelines.flux, "transformer"),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.fast_cases(2)
def test_the_weights_of_a_forecast_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    make, denoiser = PIPELINES[name]
    pipeline = make()
    info = pretrained_info(tiny_pipelines.written(pipeline, tmp_path / name))

    def count(*parts: str) -> int:
        networks = [getattr(pipeline, part, None) for part in parts]
        return sum(parameter.numel() for network in networks if network is not None for parameter in network.parameters())

    forecast = forecast_batches(info, [2], 3.0, "bf16", torch.device("cpu"))
    assert forecast.text_encoder_bytes == 4 * count("text_encoder", "text_encoder_2", "text_encoder_3")
    assert forecast.denoiser_bytes == 2 * count(denoiser)
    assert forecast.autoencoder_bytes == 4 * count("vae")
    weights = forecast.text_encoder_bytes + forecast.denoiser_bytes + forecast.autoencoder_bytes
    assert forecast.total_bytes > weights + forecast.denoiser_activation_bytes
    larger = forecast_batches(info, [2, 8], 3.0, "bf16", torch.device("cpu"))
    assert larger.denoiser_activation_bytes > 3 * forecast.denoiser_activation_bytes
    assert larger.denoiser_bytes == forecast.denoiser_bytes


@pytest.mark.slow
def test_a_dry_run_forecasts_the_memory_of_every_checkpoint(
    folder: Path, tmp_path: Path, isocost: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.yaml"
    plain = {
        "name": "forecast",
        "data": {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64, "seed": 1}},
        "checkpoints": [str(folder)],
        "sweep": {"num_steps": [1], "guidance": [1], "solvers": [{"name": "euler"}], "dtype": "bf16"},
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
    }
    file.write_text(json.dumps(plain))
    outcome = isocost("run", file, "--out", tmp_path / "out", "--dry-run")
    assert outcome.status == 0
    (forecast,) = outcome.answer["memory"]
    info = pretrained_info(folder)
    study = StudySpec.from_dict(plain)
    assert forecast["total_bytes"] == forecast_sweep(info, study.sweep, 32, torch.device("cpu")).total_bytes
    assert forecast["denoiser_bytes"] == 2 * info.num_parameters
    assert forecast["warning"] is None
    assert "of device memory. Weights: text encoder" in outcome.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(memory_forecast, "free_memory_bytes", lambda _: 1000)
    outcome = isocost("run", file, "--out", tmp_path / "out", "--dry-run")
    assert outcome.status == 0
    assert "warning: " in outcome.err
    assert "cpu has < 0.001 GiB free; use dtype bf16" in outcome.err
    latency = isocost("latency", folder, "--steps", 1, "--batch", 1, "--repeats", 3, "--device", "cpu")
    assert latency.status == 0
    assert latency.err.count("GiB of device memory") == 1


MEASURED_DECODING = """
import gc, sys
import torch
from isocost.models.autoencoder import load_autoencoder
from isocost.utils.device import HostMonitor
monitor, autoencoder = HostMonitor(), load_autoencoder(sys.argv[1])
latents = torch.randn(1, 4, int(sys.argv[2]) // 2, int(sys.argv[2]) // 2)
autoencoder.decode(latents[..., :4, :4])
gc.collect()
monitor.reset_peak()
before = monitor.memory_bytes()
autoencoder.decode(latents)
print(monitor.peak_bytes() - before)
"""
"""Prints the bytes by which the memory of a new process grows. Another process could reuse memory that it has freed."""


@pytest.mark.slow
def test_a_forecast_of_a_decoder_is_near_the_measured_growth(tmp_path: Path) -> None:
    if HostMonitor().memory_kind is None:
        pytest.skip("this system cannot reset the peak of the resident memory")
    side = 512
    network = tiny_pipelines.autoencoder(block_out_channels=(32, 64), sample_size=side)
    network.save_pretrained(tmp_path, safe_serialization=True)
    counted = decoder_bytes(json.loads((tmp_path / "config.json").read_text()), side)
    assert counted > 50e6
    # The system may take memory back from a process at any moment, so one of three measurements is enough.
    command = [sys.executable, "-c", MEASURED_DECODING, str(tmp_path), str(side)]
    growths = (float(subprocess.check_output(command).split()[-1]) / counted for _ in range(3))
    assert any(1 / 1.5 < growth < 1.5 for growth in growths)  # work memory of convolutions, tensors in threads


def test_the_table_in_the_docs_is_counted() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "latency.md").read_text(encoding="utf-8")
    table = text.partition("<!-- memory of decoders -->")[2].partition("<!-- end")[0].strip().splitlines()[2:]
    names = ("stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev", "madebyollin/taesd")
    for line, name in zip(table, names, strict=True):
        config = KNOWN_AUTOENCODERS[name][1]
        whole = [decoder_bytes(config, 1024, 1, VaeSpec(dtype=dtype)) for dtype in ("fp32", "bf16")]
        assert [cell.strip() for cell in line.split("|")[3:5]] == [f"{num_bytes / 2**20:,.0f}" for num_bytes in whole]
