"""Layouts of published checkpoints that people have: other programs' files, variants, adapters, aliases of pipelines."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import tiny_pipelines
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.models.pretrained import files
from isocost.models.pretrained.files import find_folder
from isocost.models.pretrained.pipeline_config import read_pipeline, source_digest
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.sample import sample
from test_pretrained import DDIM, assert_equal, ours, theirs
from test_pretrained_lora import assert_fused, products

SETTINGS: dict[str, Any] = {"num_steps": 1, "guidance": 1.0, "num_images": 1, "solver": "ddim"}
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path_factory.mktemp("whole") / "folder")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def test_a_u_net_with_another_order_of_transformer_layers(tmp_path: Path) -> None:
    """SSD-1B and Vega have other numbers of layers on the way up."""
    pipeline = tiny_pipelines.sdxl()
    torch.manual_seed(0)
    config = {
        **{key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")},
        "down_block_types": ("DownBlock2D", tiny_pipelines.CROSS_DOWN),
        "transformer_layers_per_block": [[0], [2]],
        "reverse_transformer_layers_per_block": [[2, 1], [0, 0]],
    }
    pipeline.unet = type(pipeline.unet).from_config(config).eval()
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    assert "reverse_transformer_layers_per_block" in json.loads((folder / "unet" / "config.json").read_text())
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert_equal(ours(folder, DDIM, 3.0), theirs(pipeline, 3.0))
    assert read_info(folder).num_parameters == pipeline.unet.num_parameters()


def single_file(folder: Path) -> Path:
    file = folder.parent / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, file)
    return file


def pickled_single_file(folder: Path) -> Path:
    return single_file(folder).rename(folder.parent / "model.sft")


def comfyui_folder(folder: Path) -> Path:
    comfyui = folder.parent / "models"
    (comfyui / "checkpoints").mkdir(parents=True)
    single_file(folder).rename(comfyui / "checkpoints" / "model.safetensors")
    return comfyui


def network_folder(folder: Path) -> Path:
    return folder / "unet"


OTHER_LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "single file": (
        single_file,
        r"a single file, not a diffusers pipeline folder; convert it: .*from_single_file.*save_pretrained",
    ),
    "other suffix": (pickled_single_file, r"a single file.*from_single_file"),
    "ComfyUI": (comfyui_folder, r"has checkpoints/model\.safetensors, but no model_index\.json of diffusers; convert a file"),
    "network": (network_folder, r"one network, not a pipeline folder with a model_index\.json"),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_layout_is_explained(folder: Path, name: str, isocost: Any, tmp_path: Path) -> None:
    make, message = OTHER_LAYOUTS[name]
    path = make(folder)
    for read in (lambda: read_info(path), lambda: read_pipeline(path), lambda: find_folder(path)):
        with pytest.raises(ConfigError, match=message):
            read()
    outcome = isocost("sample", path, "--prompt", "a ring", "--out", tmp_path / "images")
    assert outcome.status == 2
    assert "no such checkpoint folder" not in outcome.line
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32", "ema", "non_ema", "pruned"])
@pytest.mark.fast_cases(4)
def test_a_variant_alone_is_read(folder: Path, whole: Path, variant: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(variant, torch.float32)
    for component in ("unet", "vae", "text_encoder"):
        stem = "model" if component == "text_encoder" else WEIGHTS
        file = folder / component / f"{stem}.safetensors"
        weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(weights, file.with_name(f"{stem}.{variant}.safetensors"), {"format": "pt"})
        file.unlink()
    images = sample(folder, tiny_pipelines.PROMPTS, **SETTINGS).array.astype(int)
    expected = sample(whole, tiny_pipelines.PROMPTS, **SETTINGS).array.astype(int)
    assert np.abs(images - expected).mean() < 2
    assert (np.array_equal(images, expected)) is (dtype == torch.float32)


def test_several_unknown_variants_are_named(folder: Path) -> None:
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    shutil.copy(file, file.with_name(f"{WEIGHTS}.first.safetensors"))
    file.rename(file.with_name(f"{WEIGHTS}.second.safetensors"))
    with pytest.raises(ConfigError, match="unet: has the variants first, second of its weights; keep one of them"):
        read_info(folder)


@pytest.mark.parametrize(
    "pipeline",
    ["StableDiffusionPAGPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"],
)
@pytest.mark.fast_cases(3)
def test_a_pipeline_with_the_networks_of_the_plain_one(folder: Path, whole: Path, pipeline: str) -> None:
    tiny_pipelines.change(folder / "model_index.json", _class_name=pipeline)
    expected = sample(whole, tiny_pipelines.PROMPTS, **SETTINGS).array
    assert np.array_equal(sample(folder, tiny_pipelines.PROMPTS, **SETTINGS).array, expected)
    tiny_pipelines.change(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ConfigError, match="in_channels = 9: a network for inpainting"):
        read_info(folder)


def test_a_refiner_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.sdxl(), tmp_path / "sdxl")
    tiny_pipelines.change(
        folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True
    )
    with pytest.raises(ConfigError, match="requires_aesthetics_score = True: this is a refiner"):
        read_info(folder)


def test_a_square_sample_size_may_be_a_pair(folder: Path, whole: Path) -> None:
    tiny_pipelines.change(folder / "unet" / "config.json", sample_size=[8, 8])
    assert read_info(folder).resolution == read_info(whole).resolution
    expected = sample(whole, "a ring", **SETTINGS).array
    assert np.array_equal(sample(folder, "a ring", **SETTINGS).array, expected)


def adapter(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """A LoRA in the layout of the package peft."""
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{layer}.lora_{name}.weight": pair[index].contiguous()
        for layer, pair in pairs.items()
        for index, name in enumerate("AB")
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True, **config}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


def test_an_adapter_of_peft_is_fused_with_the_alpha_of_its_config(whole: Path, tmp_path: Path) -> None:
    pairs = products(tiny_pipelines.unet())
    source = f"{whole} + {adapter(tmp_path / 'style', pairs)}:0.5"
    assert_fused(source, whole, pairs, 0.5 * 8 / 2)
    assert read_info(Path(source)).variant == "folder + style:0.5"
    digest = source_digest(source)
    adapter(tmp_path / "style", pairs, lora_alpha=4)
    assert source_digest(source) != digest


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = LOHA: only adapters of type LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rank-stabilised scales"),
        ({"alpha_pattern": {"to_q": 3}}, "alphas by pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa: it changes the weights of the network too"),
    ],
)
def test_another_adapter_is_refused(whole: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = adapter(tmp_path / "style", products(tiny_pipelines.unet()), **config)
    with pytest.raises(ConfigError, match=message):
        read_info(Path(f"{whole} + {folder}"))


@pytest.mark.parametrize("alpha", ["8", [8], {}, True, float("nan"), 10**400])
def test_an_alpha_that_is_no_number_is_refused(whole: Path, tmp_path: Path, alpha: Any) -> None:
    folder = adapter(tmp_path / "style", products(tiny_pipelines.unet()), lora_alpha=alpha)
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors: .*: alpha = .*: must be a finite number") as caught:
        read_info(Path(f"{whole} + {folder}"))
    assert "\n" not in str(caught.value)


def test_an_adapter_without_its_config_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "style", products(tiny_pipelines.unet()))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json: missing"):
        read_info(Path(f"{whole} + {folder}"))


def test_a_home_folder_is_expanded(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    pairs = products(tiny_pipelines.unet())
    adapter(whole.parent / "style", pairs)
    assert load_checkpoint("~/folder").digest == load_checkpoint(whole).digest
    for source in ("~/folder", "~/folder + ~/style:0.5"):
        info = read_info(Path(source))
        assert info.pretrained is not None
        assert info.pretrained.path == source.replace("~", str(whole.parent))
        assert source_digest(source) == source_digest(info.pretrained.path)


def test_checkpoints_of_one_name_are_told_apart_by_their_owner(whole: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(whole, tmp_path / owner / "name")) for owner in ("first", "second")]
    tiny_pipelines.change(folders[1] / "scheduler" / "scheduler_config.json", beta_end=0.013)
    plain = {
        "name": "published",
        "data": {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64}},
        "checkpoints": [str(folder) for folder in folders],
        "sweep": {"solvers": [{"name": "ddim"}], "num_steps": [1], "guidance": [1]},
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
    }
    pipeline = Pipeline(parse_spec(StudySpec, plain, "published"), tmp_path / "out")
    assert [run.variant for run in pipeline.runs] == ["name", "second/name"]


def test_prompts_that_are_cut_are_counted(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "a ring " * 40
    with caplog.at_level(logging.WARNING, "isocost"):
        sample(whole, ["a ring", long], **SETTINGS)
    assert "of 2 distinct captions, 1 (50.0%) are longer than 77 tokens and are cut" in caplog.text
    caplog.clear()
    sample(whole, "a ring", **SETTINGS)
    assert "tokens" not in caplog.text
    pixart = tiny_pipelines.written(tiny_pipelines.pixart(), tmp_path / "pixart")
    sample(pixart, [long, "a ring"], **SETTINGS)
    assert "of 2 distinct captions, 1 (50.0%) are longer than 120 tokens and are cut" in caplog.text


FLUX_STEM = "lora_unet_double_blocks_0_img_mlp_2"


@pytest.mark.parametrize(
    "extra",
    [
        [
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q.alpha",
        ],
        ["lora_unet_double_blocks_0_img_mlp_2.diff_b"],
        ["lora_unet_double_blocks_0_img_norm1.diff"],
        ["lora_unet_other_layer.alpha"],
        [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        ],
    ],
    ids=lambda keys: keys[0].rpartition("_")[2],
)
def test_a_flux_lora_is_used_as_a_whole_or_refused(tmp_path: Path, extra: list[str]) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.flux(), tmp_path / "flux")
    pair = {"lora_down.weight": torch.randn(2, 128), "lora_up.weight": torch.randn(32, 2), "alpha": torch.tensor(1.0)}
    tensors = {f"{FLUX_STEM}.{name}": value for name, value in pair.items()}
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, {"format": "pt"})
    assert read_info(Path(f"{folder} + {file}")).variant == "flux + style"
    shapes = {"alpha": (), "up.weight": (32, 2), "down.weight": (2, 32)}
    values = {key: torch.ones(next((shape for end, shape in shapes.items() if key.endswith(end)), (32,))) for key in extra}
    save_file({**tensors, **values}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"style\.safetensors: ") as caught:
        read_info(Path(f"{folder} + {file}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_a_textual_inversion_of_several_vectors_equals_the_pipeline(tmp_path: Path, family: str) -> None:
    pipeline = getattr(tiny_pipelines, family)()
    torch.manual_seed(1)
    vectors = 3 * torch.randn(3, tiny_pipelines.WIDTH)
    encoders = [(pipeline.text_encoder, pipeline.tokenizer)]
    encoders += [(pipeline.text_encoder_2, pipeline.tokenizer_2)] if family == "sdxl" else []
    for encoder, tokenizer in encoders:
        pipeline.load_textual_inversion(vectors, token="<ring>", text_encoder=encoder, tokenizer=tokenizer)
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    prompts = ["a <ring> on white", "two blue squares"]
    assert prompts != tiny_pipelines.PROMPTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_pipelines, "PROMPTS", prompts)
        assert_equal(ours(folder, DDIM, 3.0), theirs(pipeline, 3.0))


def repository(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make a folder the repository of every Hub id; returns the list of the files that are downloaded from it."""
    downloaded: list[str] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        for found in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            if not (cache / found).exists():
                (cache / found).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / found, cache / found)
                downloaded.append(found)
        return str(cache)

    monkeypatch.setattr(files, "snapshot_download", snapshot)
    return downloaded


@pytest.mark.parametrize(
    ("variants", "downloaded"),
    [
        (["", "fp16", "non_ema"], ""),
        (["bf16", "fp16", "non_ema"], "fp16"),
        (["non_ema", "ema"], "ema"),
        (["non_ema"], "non_ema"),
        (["pruned"], "pruned"),
    ],
)
def test_one_variant_of_the_weights_is_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variants: list[str], downloaded: str
) -> None:
    """Also the variant non_ema, where a repository has no other."""
    weights = folder / "unet" / f"{WEIGHTS}.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    for variant in variants:
        (folder / "unet" / ".".join(filter(None, (WEIGHTS, variant, "safetensors")))).write_bytes(content)
    names = repository(folder, tmp_path / "cache", monkeypatch)
    found = find_folder("owner/name")
    expected = ".".join(filter(None, (WEIGHTS, downloaded, "safetensors")))
    assert [name for name in names if name.startswith("unet/") and name.endswith("safetensors")] == [f"unet/{expected}"]
    assert files.weight_files(found / "unet") == (downloaded, [found / "unet" / expected])
    assert read_info(found).num_parameters > 0


def test_shards_of_a_variant_are_downloaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_pipelines.stable_diffusion().unet
    (folder / "unet" / f"{WEIGHTS}.safetensors").unlink()
    for variant in ("fp16", "non_ema"):
        network.save_pretrained(folder / "unet", max_shard_size="100KB", variant=variant)
    names = repository(folder, tmp_path / "cache", monkeypatch)
    assert files.weight_files(find_folder("owner/name") / "unet")[0] == "fp16"
    shards = [name for name in names if name.startswith("unet/") and name.endswith("safetensors")]
    assert len(shards) > 1
    assert all("fp16" in name for name in shards)


def test_a_repository_with_pickled_weights_alone_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "unet" / f"{WEIGHTS}.safetensors").rename(folder / "unet" / f"{WEIGHTS}.bin")
    names = repository(folder, tmp_path / "cache", monkeypatch)
    with pytest.raises(
        ConfigError,
        match=r"owner/name: unet/diffusion_pytorch_model\.safetensors: missing in the repository.*; pickled weights are",
    ):
        find_folder("owner/name")
    assert not any(name.endswith(".bin") for name in names)
