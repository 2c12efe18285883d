"""Estimates of a study: arithmetic against independent counts, assumptions, and a study of which only the file is available."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import alexnet

from conftest import plain_study, tiny_study
from isocost.cli import main
from isocost.config.base import parse_spec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.study import SeedReplicatesSpec, StudySpec
from isocost.config.study_yaml import load_study
from isocost.config.training import TrainSpec
from isocost.errors import ConfigError
from isocost.estimate import estimator
from isocost.estimate.accelerators import DEVICES, Cluster, Device, Work, parse_cluster
from isocost.estimate.component_shapes import (
    TransformerShape,
    autoencoder_shape,
    extractor_gflop,
    text_encoder_shape,
)
from isocost.estimate.estimator import SizeEstimate, StudyEstimate, estimate_study, point_bytes
from isocost.models.paper_table import TABLE_1
from isocost.pipeline.dry_run import plan
from isocost.pipeline.pipeline import Pipeline
from isocost.training.memory_estimate import TrainingMemory, training_memory

PAPER = Path(__file__).resolve().parents[1] / "studies" / "paper.yaml"
ONE_H200 = Cluster(1, DEVICES["H200"])
RATE = 0.4 * 989e3
"""GFLOP/s of bf16 on one H200 at 40 % utilisation."""


@pytest.fixture
def isocost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process: exit status, standard output, standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isocost", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return command


@pytest.fixture
def unlimited_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything fits, so the memory of a step is not computed."""
    monkeypatch.setattr(estimator, "training_memory", lambda *_: TrainingMemory(0, 0))


@pytest.fixture(scope="module")
def estimate_866m() -> StudyEstimate:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(estimator, "training_memory", lambda *_: TrainingMemory(0, 0))
        return estimate_study(load_study(PAPER, {"family.widths": [320]}), ONE_H200)


def only_size(estimate: StudyEstimate) -> SizeEstimate:
    (size,) = estimate.sizes
    return size


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices_are_parsed() -> None:
    assert parse_cluster("64xH200") == Cluster(64, DEVICES["H200"])
    assert parse_cluster("1 x rtx-4090").device.name == "RTX4090"
    assert parse_cluster("8xTPUv5e").device.bf16_tflops == 197
    assert str(parse_cluster("8xA100")) == "8 x A100"


@pytest.mark.parametrize("text", ["64xH300", "H200", "0xH200", "-1xH200", "64", "x", "2.5xA100", ""])
def test_other_forms_and_names_are_refused_with_the_known_devices(text: str) -> None:
    with pytest.raises(ConfigError, match="known devices: B200, H200, H100") as refused:
        parse_cluster(text)
    assert "\n" not in str(refused.value)


def test_rates_are_dense() -> None:
    assert DEVICES["H100"].bf16_tflops == DEVICES["H200"].bf16_tflops == 989
    for device in DEVICES.values():
        assert device.bf16_tflops >= device.tf32_tflops >= device.fp32_tflops, device.name


def test_work_is_divided_by_the_rate_of_its_arithmetic() -> None:
    device = Device("invented", 100, 50, 10, 80, "a test")
    work = Work(bf16=3_600 * 100e3) + Work.of("tf32", 3_600 * 50e3) + Work.of("fp32", 3_600 * 10e3)
    assert work.gflop == 3_600 * 160e3
    assert work.device_hours(device, 1.0) == pytest.approx(3)
    assert work.device_hours(device, 0.25) == pytest.approx(12)


# --- hours ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_is_three_forward_passes_per_image(estimate_866m: StudyEstimate) -> None:
    size = only_size(estimate_866m)
    assert size.size == "866M"
    assert size.training_images == 500_000 * 2048
    assert size.training_gflop == pytest.approx(3 * 804.257 * 1.024e9, rel=1e-5)
    assert size.training_device_hours / 24 == pytest.approx(3 * 804.257 * 1.024e9 / RATE / 86_400, rel=1e-5)
    assert size.training_device_hours / 24 == pytest.approx(72.3, abs=0.1)


@pytest.mark.slow
def test_the_sweep_is_every_point_of_the_grid_and_one_per_snapshot(estimate_866m: StudyEstimate) -> None:
    """3 solvers x (4 + 6 + 8 + 10 + 20 + 50) steps x 9 guidance values; snapshots at 50 steps, the last one is in the grid."""
    size = only_size(estimate_866m)
    assert size.snapshots == 10
    assert size.points == 3 * 6 * 9 + 9
    assert size.images == 171 * 30_000
    evaluations = 3 * 98 * 9 + 9 * 50
    assert size.sampling_gflop == pytest.approx(804.257 * 2 * evaluations * 30_000, rel=1e-5)
    assert size.decoding_gflop == pytest.approx(2514.5 * 171 * 30_000, rel=1e-4)
    seconds = size.sampling_gflop / RATE + size.decoding_gflop / (0.4 * 494e3) + size.features_gflop / (0.4 * 67e3)
    assert size.sweep_device_hours == pytest.approx(seconds / 3600)


@pytest.mark.slow
def test_prompts_encoded_in_each_step_and_the_latent_cache(estimate_866m: StudyEstimate, unlimited_memory: None) -> None:
    size, assets = only_size(estimate_866m), estimate_866m.assets
    assert size.preparing_gflop == pytest.approx(47.09 * 1.024e9, rel=1e-3)
    assert assets.cache_images == 600_000_000
    assert assets.cache_gflop == pytest.approx(1116.66 * 6e8, rel=1e-4)
    assert assets.cache_bytes == pytest.approx(6e8 * (4 * 4 * 64 * 64 + 4 * 77 + 28), rel=1e-6)
    cached = only_size(
        estimate_study(load_study(PAPER, {"family.widths": [320], "text_encoder.cache_prompt_embeds": True}), ONE_H200)
    )
    assert cached.preparing_gflop == 0


def test_totals_are_the_sums_of_their_parts(estimate_866m: StudyEstimate) -> None:
    size, assets, total = only_size(estimate_866m), estimate_866m.assets, estimate_866m.total
    assert assets.cache_device_hours is not None
    assert assets.cache_bytes is not None
    assert size.device_hours == size.training_device_hours + size.preparing_device_hours + size.sweep_device_hours
    assert total["device_hours"] == pytest.approx(size.device_hours + assets.cache_device_hours)
    assert total["disk_bytes"] == size.disk_bytes + assets.cache_bytes
    assert size.disk_bytes == size.resume_state_bytes + size.checkpoints_bytes + size.points_bytes
    assert size.checkpoints_bytes == 10 * 4 * size.num_parameters
    # Two resume states that are stored and one that is being written; each has weights, 2 moments and 2 EMA weights.
    assert size.resume_state_bytes == 3 * 20 * size.num_parameters


def test_time_is_inverse_to_devices_and_utilisation(estimate_866m: StudyEstimate, unlimited_memory: None) -> None:
    study = load_study(PAPER, {"family.widths": [320]})
    many = estimate_study(study, parse_cluster("64xH200"))
    assert many.total["hours"] == pytest.approx(estimate_866m.total["hours"] / 64)
    assert many.total["device_hours"] == pytest.approx(estimate_866m.total["device_hours"])
    slow = estimate_study(study, ONE_H200, utilisation=0.2)
    assert slow.total["hours"] == pytest.approx(2 * estimate_866m.total["hours"])
    assert any("utilisation is 20% of these rates" in sentence for sentence in slow.assumptions)
    odd = estimate_study(study, parse_cluster("24xH200"))
    assert any("2048 is not divisible by 24 devices" in sentence for sentence in odd.assumptions)
    assert not any("is not divisible" in sentence for sentence in many.assumptions)


def test_fp32_has_its_full_precision_rate(estimate_866m: StudyEstimate, unlimited_memory: None) -> None:
    plain = estimate_study(load_study(PAPER, {"family.widths": [320], "train.dtype": "fp32"}), ONE_H200)
    assert only_size(plain).training_device_hours == pytest.approx(only_size(estimate_866m).training_device_hours * 989 / 67)
    assert any("fp32 at its full-precision rate" in sentence for sentence in plain.assumptions)
    assert not any("fp32 at its full-precision rate" in sentence for sentence in estimate_866m.assumptions)


# --- against the plan of a run ------------------------------------------------------------------------------------------


def downstream_study() -> StudySpec:
    """The tiny study with all fine-tuning tasks."""
    few = {"num_steps": [1, 2, 4], "guidance": [1, 2], "batch_size": 16}
    students = {"guidance_range": [1, 4], "stages": [4, 2], "train": {"num_images": 64, "snapshots": [32]}, "sweep": few}
    plain = plain_study(
        family={"widths": [8]},
        train={"num_images": 64, "snapshots": [32], "batch_size": 16, "prediction_type": "v_prediction"},
        distill={"variants": ["codi", "progressive"], **students},
        superres={
            "starts": ["pretrained", "scratch"],
            "train": {"num_images": 32},
            "sweep": {"num_steps": [1, 2]},
            "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "paired_metrics": ["psnr"]},
            "distill": {"variants": ["codi"], "train": {"num_images": 32}, "sweep": {"num_steps": [1, 4]}},
        },
        dreambooth={
            "subjects": {"kind": "scenes", "num_subjects": 2, "num_prompts": 3},
            "num_images": 2,
            "num_prior_images": 32,
            "prior": {"num_images": 6, "num_steps": 1, "guidance": 1},
            "train": {"num_images": 32},
            "sweep": {"num_steps": [2], "guidance": [2]},
        },
    )
    return parse_spec(StudySpec, plain, "tiny")


@pytest.mark.slow
def test_an_estimate_has_the_work_of_a_dry_run(tmp_path: Path, unlimited_memory: None) -> None:
    study = downstream_study().model_copy(update={"seed_replicates": SeedReplicatesSpec(seeds=(1,))})
    planned = plan(Pipeline(study.model_copy(update={"dreambooth": None}), tmp_path / "out"))
    estimate = estimate_study(study, ONE_H200)
    by_size: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in planned["sizes"]:
        by_size.setdefault((row["task"], row["size"]), []).append(row)
    sizes = {(size.task, size.size): size for size in estimate.sizes if size.task != "dreambooth"}
    assert sizes.keys() == by_size.keys()
    for key, size in sizes.items():
        rows = by_size[key]
        assert (size.training_images, size.points, size.images, size.disk_bytes) == tuple(
            sum(row[name] for row in rows) for name in ("images_to_train", "points", "images", "disk_bytes")
        ), key
        assert size.sampling_gflop == pytest.approx(sum(row["sampling_gflop"] for row in rows))
        assert size.training_gflop == pytest.approx(sum(row["training_gflop"] for row in rows))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_subject_is_trained_and_scored_before_and_after(unlimited_memory: None) -> None:
    estimate = estimate_study(downstream_study(), ONE_H200)
    (size,) = (size for size in estimate.sizes if size.task == "dreambooth")
    assert size.num_trainings == 2
    assert size.training_images == 2 * 32
    assert size.points == 2 * 3 + 1
    assert size.images == 2 * (6 + 32 + 6) + 32
    assert size.preparing_gflop > size.gflop_per_forward * 2 * 6
    assert any("2 subjects with 3 prompts each" in sentence for sentence in estimate.assumptions)


def test_parts_that_cannot_be_counted_from_the_file_are_listed(unlimited_memory: None) -> None:
    plain = plain_study(
        distill={"teachers": ["runs/a"], "train": {"num_images": 64}, "sweep": {"num_steps": [1], "guidance": [1]}},
        superres={"parents": ["runs/b"], "train": {"num_images": 64}, "sweep": {"num_steps": [1]}},
    )
    plain["data"]["train"] = {"kind": "folder", "path": "absent"}
    estimate = estimate_study(parse_spec(StudySpec, plain, "tiny"), ONE_H200)
    assert {size.task for size in estimate.sizes} == {"text2image"}
    for part in ("distill: its teachers", "superres: its parents", "the latent cache", "data.train.limit=N"):
        assert any(part in sentence for sentence in estimate.not_counted), part
    assert estimate.assets.cache_bytes is None


# --- disk and memory --------------------------------------------------------------------------------------------------


def test_the_disk_of_the_cache_is_estimated_before_it_is_written(tmp_path: Path, unlimited_memory: None) -> None:
    study = tiny_study()
    assets = Pipeline(study, tmp_path / "out").assets
    before = assets.cache_bytes()
    estimated = estimate_study(study, ONE_H200).assets.cache_bytes
    assert len(assets.load_or_build_latent_cache()) == 192
    written = assets.cache_bytes()
    assert before == pytest.approx(written, rel=0.02)
    assert estimated is not None
    assert estimated >= before  # scenes share captions, which the estimate does not know


def test_the_disk_of_a_point_is_its_features_and_a_few_images() -> None:
    protocol = ProtocolSpec(
        features=("efficientnet-lite0", "inception"), feature_dtype="fp16", paired_metrics=("psnr",), alignment="class"
    )
    assert point_bytes(protocol, 1000, 64) == 1000 * (2 * (1280 + 2048) + 3 * 8) + 12 * 3 * 64**2


SMALL = ModelSpec(width=16, latent_size=8, cross_attention_dim=64, layers_per_block=1, num_levels=2)
SPEC = TrainSpec(num_images=64, batch_size=8)


def test_sizes_narrower_than_one_that_fits_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [SMALL.model_copy(update={"width": width}) for width in (8, 16, 24)]
    checked: list[int] = []

    def training_memory(model: ModelSpec, *_: Any) -> TrainingMemory:
        checked.append(model.width)
        return TrainingMemory(0, model.width * 10**9)

    monkeypatch.setattr(estimator, "training_memory", training_memory)
    monkeypatch.setattr(estimator, "suggest_settings", lambda model, spec, cost, tokens, free: f"less than {free}")
    assert all(fit.fits and not fit.remedy for fit in estimator.memory_fits(models, SPEC, 4, ONE_H200).values())
    assert checked.pop() == 24
    fits = estimator.memory_fits(models, SPEC, 4, Cluster(1, Device("invented", 1, 1, 1, 20, "a test")))
    assert {model.width: (fit.fits, fit.remedy) for model, fit in fits.items()} == {
        8: (True, ""),
        16: (True, ""),
        24: (False, "less than 20000000000"),
    }
    assert checked == [24, 16]


@pytest.mark.slow
def test_a_size_that_does_not_fit_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = training_memory(SMALL, SPEC, 1, 4)
    monkeypatch.setattr(Device, "memory_bytes", memory.state * 5 // 4 - 1)
    (fit,) = estimator.memory_fits([SMALL], SPEC, 4, ONE_H200).values()
    # Weights, two moments and one EMA, and one gradient in addition.
    assert (fit.model_state_bytes, fit.fits) == (memory.state * 5 // 4, False)
    assert "train.sharding: fsdp over" in fit.remedy
    monkeypatch.setattr(Device, "memory_bytes", memory.total)
    assert estimator.memory_fits([SMALL], SPEC, 4, ONE_H200)[SMALL].fits


# --- autoencoders, text encoders, extractors --------------------------------------------------------------------------------


def test_configs_that_are_not_available_are_reported_or_refused(tmp_path: Path) -> None:
    known = autoencoder_shape(load_study(PAPER))
    assert (known.latent_channels, known.factor) == (4, 8)
    assert "which was not read; assumed: Stable Diffusion's autoencoder" in known.description
    with pytest.raises(
        ConfigError, match=r"autoencoder\.path: somebody/else: its config was not found; .* --set autoencoder\.path=NAME"
    ):
        autoencoder_shape(load_study(PAPER, {"autoencoder.path": "somebody/else"}))
    text = text_encoder_shape(TextEncoderSpec(path="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", max_tokens=77))
    assert text.cross_attention_dim == 1024
    assert "which was not read" in text.description
    with pytest.raises(
        ConfigError, match=r"text_encoder\.path: somebody/else: its config was not found; .* --set text_encoder\.path=NAME"
    ):
        text_encoder_shape(TextEncoderSpec(path="somebody/else"))


@pytest.mark.slow
def test_a_config_that_is_available_is_read(tmp_path: Path, unlimited_memory: None) -> None:
    autoencoder = {
        "_class_name": "AutoencoderKL",
        "latent_channels": 8,
        "block_out_channels": [32, 32, 64],
        "layers_per_block": 1,
    }
    autoencoder |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(autoencoder))
    study = tiny_study(autoencoder={"kind": "pretrained", "path": str(tmp_path), "subfolder": "vae"})
    shape = autoencoder_shape(study)
    assert (shape.latent_channels, shape.factor) == (8, 4)
    assert shape.decode_gflop > shape.encode_gflop > 0
    assert "whose config was read" in shape.description
    assert autoencoder_shape(tiny_study(autoencoder={"kind": "pretrained", "path": "scenes"})).latent_channels == 4
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 96, "num_heads": 2, "d_kv": 64}))
    assert text_encoder_shape(TextEncoderSpec(path=str(tmp_path))).cross_attention_dim == 96
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "hidden_size": 80}))
    other = text_encoder_shape(TextEncoderSpec(path=str(tmp_path)))
    assert (other.cross_attention_dim, other.gflop) == (80, None)
    not_counted = estimate_study(tiny_study(text_encoder={"path": str(tmp_path), "max_tokens": 8}), ONE_H200).not_counted
    assert any("encoding of prompts" in part for part in not_counted)


def count_gflop(network: Any, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops() / 1e9


def test_transformers_are_counted_as_networks_are() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, T5Config, T5EncoderModel

    ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160))
        t5 = T5EncoderModel(T5Config(d_model=64, d_kv=8, num_heads=4, d_ff=96, num_layers=2, feed_forward_proj="gated-gelu"))
        dino = Dinov2Model(Dinov2Config(patch_size=14, image_size=518))
    assert TransformerShape(64, 3, 160).gflop(7) == pytest.approx(count_gflop(clip.eval(), ids))
    assert TransformerShape(64, 2, 96, feedforward_products=3, attention_width=32).gflop(7) == pytest.approx(
        count_gflop(t5.eval(), ids)
    )
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert gflop_of("dinov2-vit-b-14") == pytest.approx(count_gflop(dino.eval(), image), rel=1e-3)


def gflop_of(name: str, feature_size: int = 64) -> float:
    return extractor_gflop(ProtocolSpec(features=(name,), feature_size=feature_size))


def test_extractors_are_counted_as_networks_are() -> None:
    from efficientnet_lite_pytorch import EfficientNet
    from torch_fidelity import feature_extractor_inceptionv3 as source

    with (
        mock.patch.object(source, "load_state_dict_from_url", return_value={}),
        mock.patch.object(source.FeatureExtractorInceptionV3, "load_state_dict", return_value=None),
        torch.device("meta"),
    ):
        inception = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    image = torch.empty(1, 3, 64, 64, dtype=torch.uint8, device="meta")
    assert gflop_of("inception") == pytest.approx(count_gflop(inception, image), rel=1e-3)
    with torch.device("meta"):
        lite = EfficientNet.from_name("efficientnet-lite0", image_size=224).eval()
    expected = count_gflop(lite.extract_features, torch.empty(1, 3, 224, 224, device="meta"))
    assert extractor_gflop(ProtocolSpec(feature_size=224)) == pytest.approx(expected)
    with torch.device("meta"):
        convolutions = alexnet().eval().features
    for side in (64, 80, 224):
        expected_alexnet = count_gflop(convolutions, torch.empty(1, 3, side, side, device="meta"))
        assert gflop_of("alexnet", side) == pytest.approx(expected_alexnet)
    both = ProtocolSpec(feature_size=224, features=("efficientnet-lite0", "inception"))
    assert extractor_gflop(both) == pytest.approx(expected + gflop_of("inception"))


# --- the command line -------------------------------------------------------------------------------------------------


def without_network(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Change into an empty folder and refuse network connections."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    monkeypatch.chdir(folder)


@pytest.mark.slow
def test_the_papers_study_needs_neither_data_nor_network(
    isocost: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlimited_memory: None
) -> None:
    without_network(monkeypatch, tmp_path)
    status, out, err = isocost("run", PAPER, "--dry-run", "--devices", "64xH200", "--set", "family.widths=[64,320,768]")
    assert status == 0
    answer = json.loads(out.splitlines()[-1])
    days = [size["training_device_hours"] / 24 for size in answer["sizes"]]
    assert days == [pytest.approx(4.76, abs=0.01), pytest.approx(72.3, abs=0.1), pytest.approx(377, abs=0.5)]
    points = [size["points"] for size in answer["sizes"]]
    assert points == [162 + 5, 162 + 9, 162 + 12]
    total = answer["total"]
    assert (total["points"], total["images"]) == (512, 512 * 30_000)
    for text in (*answer["assumptions"], *answer["not_counted"], "training images", "512 points, 15,360,000 images"):
        assert text in err
    assert {"assets", "assumptions", "devices", "not_counted", "sizes", "study", "total", "utilisation"} == answer.keys()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_papers_study_with_all_sizes(isocost: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch, tmp_path)
    status, out, _ = isocost("run", PAPER, "--dry-run", "--devices", "64xH200")
    assert status == 0
    answer = json.loads(out.splitlines()[-1])
    assert [size["size"] for size in answer["sizes"]] == [row.size for row in TABLE_1]
    assert all(size["fits"] for size in answer["sizes"])
    total = answer["total"]
    assert (total["points"], total["images"]) == (1871, 1871 * 30_000)
    assert total["training_device_hours"] / 24 == pytest.approx(847, rel=0.01)
    assert total["disk_bytes"] == pytest.approx(41.4e12, rel=0.01)
    status, out, err = isocost("run", PAPER, "--dry-run", "--devices", "8xA100", "--set", "family.widths=[512,768]")
    assert status == 0
    assert [size["fits"] for size in json.loads(out.splitlines()[-1])["sizes"]] == [True, False]
    assert (
        "! 5B: does not fit as the study has it. 80 GB of memory are free; it fits with train.sharding: fsdp over 2 processes"
        in err
    )


def test_incompatible_options_are_refused_in_one_line(isocost: Any) -> None:
    for options, message in (
        (("--devices", "8xH200"), "give --dry-run as well"),
        (("--dry-run", "--utilisation", "0.3"), "give --devices as well"),
        (
            ("--dry-run", "--devices", "8xH200", "--utilisation", "1.5"),
            "--utilisation 1.5: it should be less than or equal to 1",
        ),
        (("--dry-run", "--devices", "8xVoodoo2"), "unknown device Voodoo2; known devices: B200, H200"),
    ):
        status, _, err = isocost("run", PAPER, *options)
        assert status == 2
        assert message in err.strip().splitlines()[-1]


def test_a_dry_run_prints_points_images_and_disk(isocost: Any, tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain_study()))
    status, out, err = isocost("run", file, "--out", tmp_path / "out", "--dry-run")
    assert status == 0
    total = json.loads(out.splitlines()[-1])["total"]
    assert (total["points"], total["images"]) == (10, 320)
    assert total["disk_bytes"] > 192 * 4 * 4 * 8 * 8
    assert "10 points of 320 images, of these 10 points of 320 images to sample" in err
