"""Autoencoders: PCA against linear algebra, pretrained ones against diffusers, a trained one against PCA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers.utils.logging import is_progress_bar_enabled

from conftest import tiny_study
from isocost.config.data import ScenesSource
from isocost.config.model import TextEncoderSpec, TrainedAutoencoderSpec
from isocost.data.latent_cache import load_images
from isocost.errors import ConfigError, RunError
from isocost.metrics.image_similarity import psnr
from isocost.models.autoencoder import DiffusersVAE, PCAAutoencoder, load_autoencoder, to_uint8, to_unit
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.training.autoencoder import build_autoencoder, normalize_latents, train_autoencoder


@pytest.fixture(scope="module")
def images() -> Tensor:
    return load_images(ScenesSource(kind="scenes", num_images=256, seed=3), 32, 0).images


def test_grey_levels_survive_the_unit_scale() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(levels)), levels)


def test_the_error_of_the_pca_autoencoder_is_the_sum_of_the_dropped_eigenvalues(images: Tensor) -> None:
    autoencoder = PCAAutoencoder.fit(images, 4, 6)
    patches = to_unit(images).numpy().reshape(256, 3, 8, 4, 8, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48).astype(float)
    values = np.linalg.eigvalsh(np.cov(patches.T))
    latents, std = autoencoder.encode(images)
    assert latents.shape == (256, 6, 8, 8)
    assert not std.any()
    blocks = (
        torch.einsum("cp,nchw->nphw", autoencoder.basis, latents * autoencoder.scale[:, None, None])
        + autoencoder.mean[:, None, None]
    )
    error = (torch.nn.functional.pixel_shuffle(blocks, 4) - to_unit(images)).square().mean() * 48
    assert float(error) == pytest.approx(values[:-6].sum(), rel=1e-3)
    assert torch.allclose(latents.var((0, 2, 3)), torch.ones(6), atol=1e-2)


def test_a_pca_autoencoder_with_all_components_is_lossless(images: Tensor) -> None:
    autoencoder = PCAAutoencoder.fit(images, 2, 12)
    assert torch.equal(autoencoder.decode(autoencoder.encode(images)[0]), images)


def test_a_pca_autoencoder_is_saved_and_loaded(images: Tensor, tmp_path: Path) -> None:
    autoencoder = PCAAutoencoder.fit(images, 4, 6)
    autoencoder.save(tmp_path)
    again = load_autoencoder(tmp_path)
    assert torch.equal(again.encode(images)[0], autoencoder.encode(images)[0])
    assert (again.factor, again.latent_channels) == (4, 6)


@pytest.mark.parametrize(("patch", "channels", "message"), [(5, 4, "does not divide"), (2, 13, "exceeds the 12 values")])
def test_an_impossible_pca_autoencoder_is_refused(images: Tensor, patch: int, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PCAAutoencoder.fit(images, patch, channels)


def test_the_shipped_autoencoder_beats_pca_of_its_latent_shape(images: Tensor) -> None:
    shipped, pca = load_autoencoder("scenes"), PCAAutoencoder.fit(images, 4, 4)
    assert (shipped.factor, shipped.latent_channels) == (4, 4)
    test_images = load_images(ScenesSource(kind="scenes", num_images=128, seed=99), 32, 0).images
    quality = {}
    for name, autoencoder in (("shipped", shipped), ("pca", pca)):
        quality[name] = psnr(test_images.numpy(), autoencoder.decode(autoencoder.encode(test_images)[0]).numpy()).mean()
    assert quality["shipped"] > quality["pca"] + 4
    mean, std = shipped.encode(test_images)
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(4), atol=0.2)
    assert torch.allclose((mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt(), torch.ones(4), atol=0.2)


def test_any_diffusers_autoencoder_encodes_as_diffusers_does(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, scaling_factor=0.3, shift_factor=0.1, **blocks
    )
    network.save_pretrained(tmp_path / "vae", safe_serialization=True)
    autoencoder = load_autoencoder(tmp_path, "vae")
    mean, std = autoencoder.encode(images[:4])
    with torch.inference_mode():
        posterior = network.encode(to_unit(images[:4])).latent_dist
        assert torch.allclose(mean, (posterior.mean - 0.1) * 0.3, atol=1e-6)
        assert torch.allclose(std, posterior.std * 0.3, atol=1e-6)
        assert torch.equal(autoencoder.decode(mean), to_uint8(network.decode(mean / 0.3 + 0.1).sample))


def test_an_autoencoder_tiny_folder_is_loaded(images: Tensor, tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path, safe_serialization=True)
    mean, std = load_autoencoder(tmp_path).encode(images[:2])
    assert mean.shape[0] == 2
    assert not std.any()


def test_folders_without_an_autoencoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder, and not a Hub id"):
        load_autoencoder(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="pickled weights are refused"):
        load_autoencoder(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------

SPEC = TrainedAutoencoderSpec(
    kind="kl", block_widths=(8, 16, 16), num_channels=4, num_images=640, batch_size=16, lr=3e-3, perceptual_fraction=0.25
)


def test_training_lowers_the_loss_and_gives_unit_latents(images: Tensor) -> None:
    losses: list[float] = []
    autoencoder = train_autoencoder(SPEC, images, progress=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.93 * losses[0]
    mean, std = autoencoder.encode(images)
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose((mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt(), torch.ones(4), atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_last_update_that_breaks_the_weights_gives_no_autoencoder(
    value: float, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step is still finite."""
    spec = SPEC.model_copy(update={"num_images": 16, "perceptual_weight": 0.0})
    step = torch.optim.AdamW.step

    def breaking(optimizer: torch.optim.AdamW, *arguments: object) -> None:
        step(optimizer, *arguments)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][-1][-1] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    with pytest.raises(RunError, match="NaN or inf"):
        train_autoencoder(spec, images)


def test_normalizing_latents_changes_no_image(images: Tensor) -> None:
    torch.manual_seed(0)
    network = build_autoencoder(SPEC, 32).eval()
    with torch.no_grad():
        before = network.decode(network.encode(to_unit(images[:8])).latent_dist.mean).sample
        spread = network.encode(to_unit(images[:8])).latent_dist.std
        normalize_latents(network, images[:64])
        posterior = network.encode(to_unit(images[:8])).latent_dist
        after = network.decode(posterior.mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert not torch.allclose(spread, posterior.std, atol=1e-3)


def test_a_resolution_that_the_levels_cannot_halve_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 levels need a resolution divisible by 4"):
        build_autoencoder(SPEC, 30)


def test_a_missing_perceptual_network_is_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"autoencoder\.perceptual"):
        train_autoencoder(SPEC.model_copy(update={"perceptual": str(tmp_path / "alexnet.safetensors")}), images)


# --- text encoder -----------------------------------------------------------------------------------------------------


def test_loading_weights_shows_no_progress_bar_of_a_library(capfd: pytest.CaptureFixture[str]) -> None:
    was_enabled = is_progress_bar_enabled()
    MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    assert capfd.readouterr().err == ""
    assert is_progress_bar_enabled() == was_enabled


def test_embeddings_of_a_prompt_do_not_depend_on_the_batch() -> None:
    encoder = MiniLMTextEncoder(TextEncoderSpec(max_tokens=12))
    batch = encoder.encode(["a red circle", "two small blue squares to the left of a ring"])
    assert batch.shape == (2, 12, 384)
    assert torch.allclose(batch[0], encoder.encode(["a red circle"])[0], atol=1e-5)
    assert encoder.tokenize(["one two three four five six seven eight nine ten eleven twelve"]).shape == (1, 12)


def test_a_missing_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: missing; the folder is incomplete"):
        MiniLMTextEncoder(TextEncoderSpec(path=str(tmp_path)))


def test_the_tiny_study_uses_the_pca_autoencoder() -> None:
    assert tiny_study().autoencoder.kind == "pca"
    assert isinstance(load_autoencoder("scenes"), DiffusersVAE)
