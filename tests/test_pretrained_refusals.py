"""Errors in a pipeline folder are reported in one line that names the file, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import tiny_pipelines
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.models.pretrained.files import content_digest, find_folder, load_tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET, VAE = Path("unet") / "config.json", Path("vae") / "config.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path_factory.mktemp("whole") / "folder")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def pickled(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_its_header(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).write_bytes((folder / "vae" / WEIGHTS).read_bytes()[:20])


def without_a_shard(folder: Path) -> None:
    unet = folder / "unet"
    (unet / WEIGHTS).unlink()
    (unet / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": "one-of-two.safetensors"}}))


def setting(file: Path, **values: object) -> Callable[[Path], None]:
    return lambda folder: tiny_pipelines.change(folder / file, **values)


def removing(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        file = folder / name
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()

    return remove


def garbage(folder: Path) -> None:
    (folder / UNET).write_text("{")


INVALID: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickles": (pickled, r"model\.bin: pickled weights are refused"),
    "truncated": (truncated, r"unet/diffusion_pytorch_model\.safetensors: truncated"),
    "header": (cut_in_its_header, r"vae/diffusion_pytorch_model\.safetensors: not a complete safetensors file"),
    "shard": (without_a_shard, r"one-of-two\.safetensors: missing; the folder is incomplete"),
    "no weights": (removing(f"unet/{WEIGHTS}"), rf"unet/{WEIGHTS}: missing"),
    "no text weights": (removing("text_encoder/model.safetensors"), r"text_encoder/model\.safetensors: missing"),
    "no config": (removing("unet/config.json"), r"unet/config\.json: missing"),
    "no scheduler": (removing("scheduler"), r"scheduler_config\.json: missing"),
    "no tokenizer": (removing("tokenizer"), r"tokenizer: missing"),
    "no vae": (removing("vae"), r"vae/config\.json: missing"),
    "not JSON": (garbage, r"unet/config\.json: not JSON"),
    "pipeline": (
        setting(Path("model_index.json"), _class_name="KandinskyPipeline"),
        "pipeline KandinskyPipeline is not supported; supported",
    ),
    "denoiser": (setting(Path("model_index.json"), unet=["diffusers", "UNet3D"]), "unet = .*UNet3D.*needs UNet2DCond"),
    "encoder": (setting(Path("model_index.json"), text_encoder=["x", "GemmaModel"]), "text_encoder = .*GemmaModel"),
    "class": (setting(UNET, _class_name="UNet2DModel"), "_class_name = UNet2DModel"),
    "inpainting": (setting(UNET, in_channels=9), "in_channels = 9: a network for inpainting"),
    "editing": (setting(UNET, in_channels=8), "in_channels = 8: a network for image editing or super-resolution"),
    "channels": (setting(UNET, in_channels=16), "in_channels = 16: .*4 latent channels"),
    "variance": (setting(UNET, out_channels=8), "out_channels = 8"),
    "sizes": (setting(UNET, sample_size=[8, 16]), r"sample_size = \[8, 16\]: must be one positive number"),
    "classes": (setting(UNET, class_embed_type="timestep"), "class_embed_type = timestep"),
    "refiner": (setting(UNET, addition_embed_type="text_time"), "addition_embed_type = text_time"),
    "blocks": (setting(UNET, down_block_types=["Other", "DownBlock2D"]), "unet/config.json: diffusers cannot build a"),
    "prediction_type": (setting(SCHEDULER, prediction_type=None), "prediction_type is missing; set it to epsilon"),
    "type": (setting(SCHEDULER, prediction_type="other"), "prediction_type = 'other': supported"),
    "scheduler": (setting(SCHEDULER, _class_name="EDMEulerScheduler"), "EDMEulerScheduler is not supported; supported"),
    "betas": (setting(SCHEDULER, beta_schedule="sigmoid"), "kind = 'sigmoid'"),
    "trained betas": (setting(SCHEDULER, trained_betas=[0.1]), r"trained_betas = \[0.1\]: not supported"),
    "thresholding": (setting(SCHEDULER, thresholding=True), "thresholding = True: isocost has no DDIMScheduler"),
    "flow": (setting(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "needs a schedule of betas"),
    "scale": (setting(VAE, scaling_factor=0), "scaling_factor is 0; set the value that the autoencoder was trained with"),
    "scale is text": (setting(VAE, scaling_factor="0.18"), "scaling_factor is '0.18'"),
    "shift": (setting(VAE, shift_factor="a"), "shift_factor is 'a'"),
    "moments": (setting(VAE, latents_mean=[0.0]), "latents_mean: latents normalized per channel"),
    "autoencoder": (setting(VAE, _class_name="VQModel"), "_class_name = VQModel: supported classes"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_folder_is_refused_in_one_line(folder: Path, name: str) -> None:
    spoil, message = INVALID[name]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as error:
        assert read_info(folder).solver
    assert "\n" not in str(error.value)


def test_only_stable_diffusion_may_omit_the_scaling_factor(folder: Path, tmp_path: Path) -> None:
    tiny_pipelines.change(folder / VAE, scaling_factor=None)
    assert read_info(folder).prediction_type == "epsilon"
    larger = tiny_pipelines.written(tiny_pipelines.sdxl(), tmp_path / "sdxl")
    tiny_pipelines.change(larger / VAE, scaling_factor=None)
    with pytest.raises(ConfigError, match="scaling_factor is missing"):
        read_info(larger)


def test_stable_diffusion_1_may_omit_the_prediction_type(tmp_path: Path) -> None:
    first = tiny_pipelines.written(tiny_pipelines.stable_diffusion(unet_changes={"cross_attention_dim": 768}), tmp_path / "sd1")
    tiny_pipelines.change(first / SCHEDULER, prediction_type=None)
    assert read_info(first).prediction_type == "epsilon"


def test_missing_weights_are_not_initialised_at_random(folder: Path) -> None:
    for component, file in (("unet", WEIGHTS), ("text_encoder", "model.safetensors")):
        weights = load_file(folder / component / file)
        name = sorted(weights)[0]
        save_file({key: value for key, value in weights.items() if key != name}, folder / component / file, {"format": "pt"})
    with pytest.raises(ConfigError, match="unet: 1 weights are missing or have another shape"):
        load_checkpoint(folder)
    from isocost.models.pretrained.prompt_encoder import load_encoder

    with pytest.raises(ConfigError, match="text_encoder: 1 weights are missing"):
        load_encoder(folder / "text_encoder", "CLIPTextModel")


def test_embeddings_that_do_not_fit_the_denoiser_are_refused(tmp_path: Path) -> None:
    from isocost.sampling.sample import sample

    folder = tiny_pipelines.written(
        tiny_pipelines.stable_diffusion(unet_changes={"cross_attention_dim": 40}), tmp_path / "folder"
    )
    with pytest.raises(ConfigError, match="embeddings have width 32, the denoiser needs 40"):
        sample(folder, ["a ring"], num_steps=1, num_images=1)


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


def test_the_digest_is_of_the_content(folder: Path, whole: Path) -> None:
    assert content_digest(folder) == content_digest(whole)
    (folder / "README.md").write_text("words")
    (folder / "unet" / "unused.bin").write_bytes(b"x")
    assert content_digest(folder) == content_digest(whole)
    file = folder / "unet" / WEIGHTS
    weights = load_file(file)
    weights["conv_out.bias"] = weights["conv_out.bias"] + torch.finfo(torch.float32).eps
    save_file(weights, file, {"format": "pt"})
    assert content_digest(folder) != content_digest(whole)


def test_a_hub_id_is_found_in_the_hubs_cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder layout of the cache (refs, snapshots) is used, without a network connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(whole, repository / "snapshots" / commit)
    info = read_info(Path("owner/name"))
    assert (info.variant, info.resolution) == ("name", tiny_pipelines.PIXELS)
    assert find_folder("owner/name@main") == repository / "snapshots" / commit
    assert load_checkpoint("owner/name").digest == content_digest(whole)
    with pytest.raises(ConfigError, match="owner/other: no such folder, not in the Hub's cache"):
        read_info(Path("owner/other"))
    (repository / "snapshots" / commit / "vae" / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=rf"vae/{WEIGHTS}: missing"):
        read_info(Path("owner/name"))
    with pytest.raises(ConfigError, match="no such folder, and not a Hub id"):
        find_folder(tmp_path / "absent")
