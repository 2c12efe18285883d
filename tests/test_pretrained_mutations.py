"""Published folders with wrong values in any file: one line, and never a traceback, an endless loop or random weights."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_pipelines
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.models.pretrained.lora import read_lora
from isocost.sampling.sample import sample

WEIGHTS = "diffusion_pytorch_model.safetensors"
DEEP = 100_000
VALUES: list[Any] = [0, -1, [4], 1e6, 10**9, 10**400, None, True, "text", {}, [], [[0]], 0.5, float("nan")]
"""Values for a field of any config."""
FAMILIES = {
    "sd": tiny_pipelines.stable_diffusion,
    "sd3": tiny_pipelines.sd3,
    "flux": tiny_pipelines.flux,
    "pixart": tiny_pipelines.pixart,
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wholes")
    return {name: tiny_pipelines.written(make(), root / name) for name, make in FAMILIES.items()}


@pytest.fixture
def folder(wholes: dict[str, Path], tmp_path: Path) -> Path:
    """A Stable Diffusion that a test may damage."""
    return Path(shutil.copytree(wholes["sd"], tmp_path / "folder"))


def refusal(folder: Path) -> str:
    """The error of sampling from a folder; empty if it gives images."""
    try:
        sample(folder, "a ring", solver="nearest", num_steps=2, guidance=1.0, num_images=1)
    except ConfigError as error:
        return str(error)
    return ""


def mutations(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, field, value): every field of every config with every value."""
    for file in sorted(folder.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name not in ("tokenizer.json", "vocab.json"):
            yield from ((file, field, value) for field in content for value in VALUES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(1)
def test_a_wrong_value_of_any_field_is_one_line(wholes: dict[str, Path], family: str) -> None:
    """A sample of all mutations; another one for every seed."""
    drawn = random.Random(family).sample(sorted(mutations(wholes[family]), key=repr), 15)
    for file, field, value in drawn:
        before = file.read_bytes()
        content = json.loads(before)
        file.write_text(json.dumps({**content, field: value}), encoding="utf-8")
        try:
            message = refusal(wholes[family])
        except Exception as error:
            raise AssertionError(f"{file.relative_to(wholes[family])}: {field} = {str(value)[:40]}") from error
        finally:
            file.write_bytes(before)
        assert "\n" not in message
        assert len(message) < 1500


def setting(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: tiny_pipelines.change(folder / name, **values)


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return write


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name, {"format": "pt"})

    return write


def shards(weight_map: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def header(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "unet" / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content.encode())

    return write


def first_as(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: value.to(dtype) if key == "conv_in.weight" else value for key, value in tensors.items()}


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(key for key, value in tensors.items() if value.is_floating_point())
    return {**tensors, name: torch.full_like(tensors[name], torch.nan)}


UNET = "unet/config.json"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "bitsandbytes": (
        setting(UNET, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"unet/config\.json: quantization_config: bitsandbytes: quantised weights are not supported",
    ),
    "quanto": (
        setting("text_encoder/config.json", quantization_config={"quant_method": "quanto"}),
        "quantization_config: quanto",
    ),
    "quantised text": (setting("vae/config.json", quantization_config="int8"), "quantization_config: int8"),
    "fp8": (weights(f"unet/{WEIGHTS}", first_as(torch.float8_e4m3fn)), "conv_in.weight has type F8_E4M3: quantised weights"),
    "int8": (weights(f"unet/{WEIGHTS}", first_as(torch.int8)), "conv_in.weight has type I8: quantised weights"),
    "scales": (
        weights(f"unet/{WEIGHTS}", lambda tensors: {**tensors, "conv_in.scale_weight": torch.ones(1)}),
        "conv_in.scale_weight has type F32: quantised weights",
    ),
    "NaN in the denoiser": (
        weights(f"unet/{WEIGHTS}", with_nan),
        r"/unet: 1 of 208 weights contain NaN or inf, .* download the file again",
    ),
    "NaN in the autoencoder": (weights(f"vae/{WEIGHTS}", with_nan), r"/vae: 1 of .* contain NaN or inf"),
    "NaN in the text encoder": (
        weights("text_encoder/model.safetensors", with_nan),
        r"/text_encoder: 1 of .* contain NaN or inf",
    ),
    "class of the pipeline": (setting("model_index.json", _class_name=["a"]), r"the pipeline \['a'\] is not supported"),
    "class of the denoiser": (setting(UNET, _class_name=["UNet2DConditionModel"]), "_class_name = "),
    "class of the scheduler": (
        setting("scheduler/scheduler_config.json", _class_name=["a"]),
        "the scheduler .* is not supported",
    ),
    "shard is a number": (shards({"conv_in.weight": 3}), "weight_map: '3' is not the name of a file"),
    "shard is null": (shards({"conv_in.weight": None, "conv_out.weight": WEIGHTS}), "weight_map: 'None' is not the name"),
    "shard is a list": (shards({"conv_in.weight": ["a"]}), "is not the name of a file in this folder"),
    "shard elsewhere": (shards({"conv_in.weight": "../x.safetensors"}), "is not the name of a file in this folder"),
    "shard with a long name": (shards({"conv_in.weight": "x" * 10_000}), "is not the name of a file in this folder"),
    "weight map": (shards(["a"]), "has no weight_map"),
    "deep header": (header('{"a":' + "[" * DEEP + "]" * DEEP + "}"), "not a complete safetensors file"),
    "header is a list": (header("[1]"), "not a complete safetensors file"),
    "offsets": (header('{"a": {"dtype": "F32", "shape": [], "data_offsets": []}}'), "not a complete safetensors file"),
    "endless offsets": (header('{"a": {"dtype": "F32", "data_offsets": [0, 1e999]}}'), "not a complete safetensors file"),
    "deep config": (text(UNET, '{"a":' + "[" * DEEP + "]" * DEEP + "}"), r"unet/config\.json: not JSON"),
    "deep index": (text("model_index.json", "[" * DEEP), r"model_index\.json: not JSON"),
    "key twice": (text("scheduler/scheduler_config.json", '{"beta_end": 0.1, "beta_end": 0.2}'), "'beta_end' appears twice"),
    "key of the index twice": (text("model_index.json", '{"vae": ["a", "b"], "vae": ["a", "b"]}'), "'vae' appears twice"),
    "layers": (setting(UNET, layers_per_block=10**6), "layers_per_block = 1000000: too large"),
    "layers as a float": (setting(UNET, layers_per_block=1e6), "layers_per_block = 1000000.0: too large"),
    "layers of the text encoder": (setting("text_encoder/config.json", num_hidden_layers=10**6), "num_hidden_layers = 1000000"),
    "channels": (setting(UNET, in_channels=[4]), r"in_channels = \[4\]: must be a number of channels"),
    "widths": (setting(UNET, block_out_channels=[0, 0]), r"unet/config\.json: "),
    "levels": (setting("vae/config.json", block_out_channels=[8] * 99), "must be the widths of 1 to 8 levels"),
    "timesteps": (setting("scheduler/scheduler_config.json", num_train_timesteps=10**9), "num_timesteps = 1000000000"),
    "vocabulary": (text("tokenizer/tokenizer.json", "[]"), "tokenizer: cannot load a tokenizer|tokens, more than|do not run"),
    "tokenizer config": (text("tokenizer/tokenizer_config.json", '{"model_max_length": [3]}'), r"model_max_length = \[3\]"),
    "tokenizer limit": (
        setting("tokenizer/tokenizer_config.json", model_max_length=512),
        "text encoders and tokenizers do not run",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_folder_is_refused_in_one_line(folder: Path, name: str) -> None:
    spoil, message = CASES[name]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        sample(folder, "a ring", solver="ddim", num_steps=1, guidance=1.0, num_images=1)
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_status_2(folder: Path, isocost: Any, tmp_path: Path) -> None:
    tiny_pipelines.change(folder / UNET, quantization_config={"quant_method": "bitsandbytes"})
    outcome = isocost("sample", folder, "--prompt", "a ring", "--out", tmp_path / "images")
    assert outcome.status == 2
    assert "quantised weights are not supported" in outcome.line
    assert not (tmp_path / "images").exists()


def test_a_lora_with_nan_or_quantised_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for dtype, value, message in ((torch.float32, torch.nan, "contains NaN or inf"), (torch.float8_e4m3fn, 1.0, "quantised")):
        pair = {
            f"{layer}.lora_A.weight": torch.full((2, 32), value).to(dtype),
            f"{layer}.lora_B.weight": torch.full((32, 2), value).to(dtype),
        }
        save_file(pair, file, {"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            read_info(Path(f"{folder} + {file}"))
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ConfigError, match="has no LoRA weights"):
        read_lora(file, "StableDiffusionPipeline", "unet", {})
