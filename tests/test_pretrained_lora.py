"""LoRAs: weights change by the product of the file, samples equal those of diffusers, unsupported files are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.schedulers import scheduling_lcm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import test_pretrained_flux
import tiny_pipelines
from isocost.config.sampling import SolverSpec
from isocost.diffusion.philox import philox_normal
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.models.pretrained.files import content_digest
from isocost.models.pretrained.lora import Lora, read_lora, split_loras
from isocost.models.pretrained.pipeline_config import source_digest
from published_configs import PUBLISHED
from test_pretrained import DDIM, SEED, assert_equal, ours, theirs

ADAPTED = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "proj_in",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "proj_mlp",
)
NAME = "pytorch_lora_weights.safetensors"


def layers(network: nn.Module, names: tuple[str, ...] = ADAPTED) -> dict[str, Tensor]:
    """Weights [O, I] or [O, I, K, K] of the layers that a LoRA usually adapts, by name."""
    weights = {name.removesuffix(".weight"): weight for name, weight in network.named_parameters() if name.endswith(".weight")}
    return {name: weight for name, weight in weights.items() if name.endswith(names)}


def products(network: nn.Module, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) of every layer."""
    torch.manual_seed(7)
    pairs = {}
    for name, weight in layers(network).items():
        down = torch.randn(rank, *weight.shape[1:]) * 0.3
        pairs[name] = (down, torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2)) * 0.3)
    return pairs


def peft_format(pairs: dict[str, tuple[Tensor, Tensor]], folder: str) -> dict[str, Tensor]:
    """The format of diffusers' current training scripts."""
    index = {"A": 0, "B": 1}
    return {f"{folder}.{layer}.lora_{x}.weight": pair[i] for layer, pair in pairs.items() for x, i in index.items()}


def kohya_format(pairs: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The format of kohya's scripts and of LCM-LoRA."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return tensors


def file_of(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    header = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / NAME, {"format": "pt", **header})
    return folder / NAME


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1, whose projections are 1 x 1 convolutions."""
    return tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path_factory.mktemp("base") / "base")


def assert_fused(source: str, base: Path, pairs: dict[str, tuple[Tensor, Tensor]], factor: float) -> None:
    """Every weight equals that of the base, plus `factor * up @ down` in the layers of the LoRA."""
    plain, fused = (layers(load_checkpoint(path).network, ("",)) for path in (base, source))
    prefix = next(iter(plain)).partition(".")[0] + "." if "transformer" in next(iter(plain)) else ""
    for layer, weight in fused.items():
        expected = plain[layer]
        if (pair := pairs.get(layer.removeprefix(prefix))) is not None:
            product = torch.einsum("rikl,orxy->oikl", *pair) if expected.ndim == 4 else pair[1] @ pair[0]
            expected = expected + factor * product
            assert float((weight - plain[layer]).abs().max()) > 1e-3
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["peft", "peft with alpha", "kohya", "older", "bare"])
@pytest.mark.fast_cases(4)
def test_weights_change_by_the_product_in_the_file(
    base: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result equals an explicit product, and `peft`, which diffusers' pipelines need for LoRAs, is not used."""
    monkeypatch.setitem(sys.modules, "peft", None)
    pairs = products(tiny_pipelines.unet())
    assert {weight.ndim for weight, _ in pairs.values()} == {2, 4}
    tensors, metadata, factor = peft_format(pairs, "unet"), None, 0.5
    if form == "peft with alpha":
        metadata, factor = {"unet.r": 2, "unet.lora_alpha": 8}, 0.5 * 8 / 2
    if form == "kohya":
        tensors, factor = kohya_format(pairs, alpha=1.0), 0.5 * 1 / 2
    if form == "older":
        pairs = {layer: pair for layer, pair in pairs.items() if "attn" in layer}
        names = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
        tensors = {}
        for layer, (down, up) in pairs.items():
            name, _, last = layer.partition(".to_")
            stem = f"unet.{name}.processor.{names[f'to_{last}']}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    if form == "bare":
        tensors = {key.removeprefix("unet."): value for key, value in tensors.items()}
    file_of(tensors, tmp_path / "style", metadata)
    assert_fused(f"{base} + {tmp_path / 'style'}:0.5", base, pairs, factor)


def test_several_add_up(base: Path, tmp_path: Path) -> None:
    pairs = products(tiny_pipelines.unet())
    file = file_of(peft_format(pairs, "unet"), tmp_path / "style")
    assert_fused(f"{base} + {file}:0.75 + {tmp_path / 'style'}:-0.25", base, pairs, 0.5)


def test_a_flux_lora_in_kohya_format(tmp_path: Path) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.flux(), tmp_path / "flux")
    layer = "transformer_blocks.0.ff.net.2"
    down, up = torch.randn(2, 128), torch.randn(32, 2)
    stem = "lora_unet_double_blocks_0_img_mlp_2"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    assert_fused(f"{folder} + {file_of(tensors, tmp_path / 'style')}", folder, {layer: (down, up)}, 0.5)


def test_kohya_block_names_of_sdxl_become_those_of_diffusers(tmp_path: Path) -> None:
    """kohya numbers the blocks of SDXL's U-Net differently; the published config defines the mapping."""
    config = PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"].config
    expected = {
        "input_blocks_4_1": "down_blocks.1.attentions.0",
        "middle_block_1": "mid_block.attentions.0",
        "output_blocks_5_1": "up_blocks.1.attentions.2",
    }
    tensors: dict[str, Tensor] = {}
    for block in expected:
        stem = f"lora_unet_{block}_transformer_blocks_0_attn1_to_q"
        pair = {"lora_down.weight": torch.randn(4, 640), "lora_up.weight": torch.randn(640, 4), "alpha": torch.tensor(1.0)}
        tensors |= {f"{stem}.{name}": value for name, value in pair.items()}
    updates = read_lora(file_of(tensors, tmp_path / "style"), "StableDiffusionXLPipeline", "unet", config)
    assert set(updates) == {f"{block}.transformer_blocks.0.attn1.to_q" for block in expected.values()}
    assert {update.factor for update in updates.values()} == {0.25}


def with_lora(pipeline: Any, file: Path, scale: float) -> Any:
    """A pipeline with a LoRA loaded and fused by diffusers."""
    pytest.importorskip("peft")
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora(lora_scale=scale)
    return pipeline


def test_stable_diffusion_with_a_lora_gives_the_samples_of_its_pipeline(base: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.stable_diffusion()
    file = file_of(kohya_format(products(pipeline.unet), alpha=1.0), tmp_path / "style")
    plain = ours(base, DDIM, 3.0)
    pipeline = with_lora(pipeline, file, 0.5)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    with_update = ours(f"{base} + {file}:0.5", DDIM, 3.0)
    assert_equal(with_update, theirs(pipeline, 3.0))
    assert float((with_update[1] - plain[1]).abs().max()) > 1e-3


def test_a_lora_that_makes_a_student(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LCM-LoRA: the LoRA's file, and LCM's scheduler instead of the folder's."""
    pipeline = tiny_pipelines.stable_diffusion()
    file = file_of(kohya_format(products(pipeline.unet), alpha=1.0), tmp_path / "lcm")
    pipeline = with_lora(pipeline, file, 1.0)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    step = iter([1, 2, 3] * 2)

    def noise(*_: Any, **__: Any) -> Tensor:
        shape = (4, tiny_pipelines.LATENT_SIZE, tiny_pipelines.LATENT_SIZE)
        return philox_normal(SEED, torch.arange(2), next(step), shape, "cpu")

    monkeypatch.setattr(scheduling_lcm, "randn_tensor", noise)
    assert_equal(ours(f"{base} + {file}", SolverSpec(name="lcm"), 1.5), theirs(pipeline, 1.5))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_with_a_lora_give_the_samples_of_their_pipelines(tmp_path: Path, family: str) -> None:
    pipeline = getattr(tiny_pipelines, family)()
    folder = tiny_pipelines.written(pipeline, tmp_path / family)
    denoiser = "unet" if family == "sdxl" else "transformer"
    file = file_of(peft_format(products(getattr(pipeline, denoiser)), denoiser), tmp_path / "style")
    pipeline, source = with_lora(pipeline, file, 0.5), f"{folder} + {file}:0.5"
    if family == "flux":
        assert_equal(ours(source, test_pretrained_flux.EULER, 3.5), test_pretrained_flux.theirs(pipeline, guidance_scale=3.5))
    elif family == "sd3":
        assert_equal(ours(source, SolverSpec(name="euler", timestep_spacing="linspace"), 3.0), theirs(pipeline, 3.0, 16))
    else:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        assert_equal(ours(source, DDIM, 3.0), theirs(pipeline, 3.0))


def test_a_checkpoint_and_its_loras_are_parsed_and_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_loras("a/b + c/d:0.8 + e.safetensors") == ("a/b", (Lora("c/d", 0.8), Lora("e.safetensors")))
    assert split_loras("a/b+c") == ("a/b+c", ())
    for invalid in ("a/b + ", " + c/d", "a/b + c/d:0"):
        with pytest.raises(ConfigError, match=r"write CHECKPOINT \+ LORA|at scale 0 does nothing"):
            split_loras(f"{invalid} ")
    file = file_of(peft_format(products(tiny_pipelines.unet()), "unet"), tmp_path / "style")
    info = read_info(Path(f"{base} + {file}:0.5"))
    assert info.variant == "base + style:0.5"
    assert (info.num_parameters, info.gflop_per_forward) == (read_info(base).num_parameters, read_info(base).gflop_per_forward)
    monkeypatch.chdir(base.parent)
    assert read_info(Path(f"base + {file.parent}:0.50")) == read_info(Path(f"base + {file.parent}:0.5"))
    digests = [source_digest(f"{base}{loras}") for loras in ("", f" + {file}", f" + {file}:0.5", f" + {file}:0.5 + {file}")]
    assert len(set(digests)) == 4
    assert digests[0] == content_digest(base)
    assert load_checkpoint(f"base + {file}:0.5").digest == digests[2]
    weights = load_file(file)
    save_file({key: 2 * value for key, value in weights.items()}, file, {"format": "pt"})
    assert source_digest(f"{base} + {file}:0.5") not in digests


def test_a_hub_id_of_a_lora_is_downloaded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isocost.models.pretrained import lora

    file = file_of(peft_format(products(tiny_pipelines.unet()), "unet"), tmp_path / "style")
    downloads = []

    def download(repository: str, filename: str, revision: str | None) -> str:
        downloads.append((repository, filename, revision))
        return str(file)

    monkeypatch.setattr(lora, "hf_hub_download", download)
    for hub_id in ("owner/name", "owner/name@main", "owner/name/8steps.safetensors"):
        name = hub_id.rpartition("/")[2].removesuffix(".safetensors")
        assert read_info(Path(f"{base} + {hub_id}:0.5")).variant == f"base + {name}:0.5"
    assert sorted(set(downloads), key=str) == [
        ("owner/name", "8steps.safetensors", None),
        ("owner/name", NAME, "main"),
        ("owner/name", NAME, None),
    ]


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def with_text_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return {**tensors, f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}


def with_magnitudes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "unet.conv_in.lora_magnitude_vector": torch.ones(32)}


def without_ups(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if "lora_A" in key}


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.zeros(value.shape[0] + 8, *value.shape[1:]) if "lora_B" in key else value for key, value in tensors.items()
    }


INVALID: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another network": (
        renamed("down_blocks.0", "down_blocks.7"),
        r"another network: the checkpoint has no layer down_blocks\.7\.",
    ),
    "another width": (wider, r"of another network: .* is \[\d+, \d+.* in the LoRA, \[\d+, \d+.* in the checkpoint"),
    "another family": (renamed("unet.", "transformer."), r"of another network: the checkpoint has no layer transformer\."),
    "text encoder": (with_text_encoder, r"2 of its weights are for text encoders \(the first is text_encoder\.text_model"),
    "DoRA": (with_magnitudes, r"unet\.conv_in\.lora_magnitude_vector: DoRA is not supported"),
    "LoKr": (renamed("lora_A", "lokr_w1"), "LoKr is not supported"),
    "half": (without_ups, "its up and down weights are incomplete"),
    "no LoRA": (renamed(".lora_", ".other_"), "neither an up nor a down weight"),
    "nothing": (lambda tensors: {}, "has no LoRA weights"),
    "mixed": (lambda tensors: {"lora_unet_conv_in.diff": torch.zeros(1)}, "not a LoRA of a StableDiffusionPipeline"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_lora_is_refused_in_one_line(base: Path, tmp_path: Path, name: str) -> None:
    spoil, message = INVALID[name]
    file = file_of(spoil(peft_format(products(tiny_pipelines.unet()), "unet")), tmp_path / "style")
    refused(f"{base} + {file}", rf"{NAME}: .*{message}")


def refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_info(Path(source))
    assert "\n" not in str(error.value)


def test_files_that_are_refused_before_they_are_loaded(base: Path, tmp_path: Path) -> None:
    whole = file_of(peft_format(products(tiny_pipelines.unet()), "unet"), tmp_path / "style")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_lora_weights.bin").write_bytes(b"x")
    refused(f"{base} + {pickled}", r"weights\.bin: a pickled LoRA is refused")
    refused(f"{base} + {pickled / 'pytorch_lora_weights.bin'}", "a pickled LoRA is refused")
    refused(f"{base} + {tmp_path / 'absent'}", "no such LoRA")
    file_of({"x": torch.zeros(1)}, tmp_path / "two").rename(tmp_path / "two" / "a.safetensors")
    (tmp_path / "two" / "b.safetensors").write_bytes(b"x")
    refused(f"{base} + {tmp_path / 'two'}", "has 2 safetensors files; give the path of one")
    metadata = {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_rslora": True}
    stable = file_of(load_file(whole), tmp_path / "stable", metadata)
    refused(f"{base} + {stable}", "trained with rank-stabilised scales")
    whole.write_bytes(whole.read_bytes()[:-100])
    refused(f"{base} + {whole}", "truncated: it has")


def test_pixart_supports_no_lora(tmp_path: Path) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.pixart(), tmp_path / "pixart")
    file = file_of({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "style")
    refused(f"{folder} + {file}", "diffusers supports no LoRA for a PixArtAlphaPipeline")
