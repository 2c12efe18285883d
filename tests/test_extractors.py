"""Feature extractors and their weights files. Oracles: the processors and networks of transformers, and lpips.

The weights are random, in the files and layouts of the published ones; the tests check the computation, not the quality.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import vgg16
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from isocost.config.data import ScenesSource
from isocost.data.latent_cache import load_images
from isocost.errors import ConfigError
from isocost.evaluation.metric_registry import METRIC_GROUPS, METRICS, check_metrics, metric_columns
from isocost.metrics.download import file_sha256, find_weights, read_tensors
from isocost.metrics.feature_extractors import EXTRACTORS, make_extractor
from isocost.metrics.lpips import load_lpips, lpips_of_maps
from isocost.metrics.preprocessing import check_images, resize_shorter_side
from isocost.metrics.vit import VIT_EXTRACTORS, CLIPFeatureExtractor, ViTFeatureExtractor


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [5, 3, 80, 80]"""
    return load_images(ScenesSource(kind="scenes", num_images=5), 80, 0).images


def save_tokenizer(folder: Path) -> None:
    """Save a CLIP tokenizer whose tokens are single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)


def save_clip(folder: Path) -> CLIPModel:
    """Save a tiny CLIP in the layout of openai/clip-vit-base-patch32: pytorch_model.bin, with a buffer of older versions."""
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 54}
    text |= {"max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 48, "patch_size": 16}, projection_dim=24)
    network = CLIPModel(config).eval()
    folder.mkdir()
    network.config.save_pretrained(folder)
    save_tokenizer(folder)
    legacy_buffers = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save({**network.state_dict(), **legacy_buffers}, folder / "pytorch_model.bin")
    return network


def save_vit(folder: Path, kind: str) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    folder.mkdir()
    if kind == "dino":
        network: nn.Module = ViTModel(ViTConfig(**shape, image_size=48, patch_size=16)).eval()
        torch.save(network.state_dict(), folder / "pytorch_model.bin")
    else:
        network = Dinov2Model(Dinov2Config(**shape, image_size=70, patch_size=14)).eval()
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors")
    network.config.save_pretrained(folder)
    return network


def source_with_hash(folder: Path, file: str) -> str:
    return f"{folder}#sha256={file_sha256(folder / file)}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPFeatureExtractor, CLIPModel]:
    folder = tmp_path_factory.mktemp("extractors") / "clip"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = save_clip(folder)
    extractor = make_extractor("clip-vit-b-32", weights={"clip-vit-b-32": source_with_hash(folder, "pytorch_model.bin")})
    assert isinstance(extractor, CLIPFeatureExtractor)
    return extractor, network


def make_vit(kind: str, folder: Path) -> tuple[ViTFeatureExtractor, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = save_vit(folder, kind)
    name, file = {
        "dino": ("dino-vit-s-16", "pytorch_model.bin"),
        "dinov2": ("dinov2-vit-b-14", "model.safetensors"),
    }[kind]
    extractor = make_extractor(name, weights={name: source_with_hash(folder, file)})
    assert isinstance(extractor, ViTFeatureExtractor)
    return extractor, network


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_metric_fits_an_extractor_and_fills_known_columns() -> None:
    for group in METRIC_GROUPS:
        assert any(metric_columns(group, name) for name in EXTRACTORS)
        for name in EXTRACTORS:
            assert set(metric_columns(group, name)) <= set(METRICS)


def test_only_inception_features_give_fid_and_kid() -> None:
    for short in ("fid", "kid", "fid_infinity", "inception_score"):
        made_by = {name for name in EXTRACTORS for group in METRIC_GROUPS if short in metric_columns(group, name)}
        assert made_by == {"inception"}
    assert all("FID" not in metric.label and "KID" not in metric.label for name, metric in METRICS.items() if "id" not in name)


def test_a_metric_without_fitting_features_names_them() -> None:
    check_metrics(("mmd", "prompt_similarity"), ("efficientnet-lite0", "pickscore"))
    check_metrics(("inception_score",), ("efficientnet-lite0",))
    with pytest.raises(ConfigError, match=r"inception_score needs one of protocol\.features: efficientnet-lite0, inception$"):
        check_metrics(("mmd", "inception_score"), ("dinov2-vit-b-14",))
    with pytest.raises(ConfigError, match=r"protocol\.metrics: unknown metric 'frechett'; did you mean frechet\?"):
        check_metrics(("frechett",), ("inception",))
    with pytest.raises(ConfigError, match=r"protocol\.features: unknown feature extractor 'inceptoin'"):
        check_metrics(("mmd",), ("inceptoin",))


def test_an_unknown_extractor_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown feature extractor 'vgg'.*dinov2-vit-l-14"):
        make_extractor("vgg")
    with pytest.raises(ConfigError, match="takes no others"):
        make_extractor("efficientnet-lite0", weights={"efficientnet-lite0": "x"})


@pytest.mark.parametrize("name", VIT_EXTRACTORS)
def test_a_vit_that_cannot_be_loaded_names_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not in the Hub's cache and cannot be downloaded; give a local folder") as refused:
        make_extractor(name)
    assert "\n" not in str(refused.value)


def test_the_hash_that_the_hub_lists_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub's cache names a large file by the SHA-256 that the Hub lists for it."""
    content = b"weights"
    sound, other = (tmp_path / name for name in ("sound", "other"))
    for folder, listed_content in ((sound, content), (other, b"other weights")):
        folder.mkdir()
        blob = folder / hashlib.sha256(listed_content).hexdigest()
        blob.write_bytes(content)
        (folder / "model.safetensors").symlink_to(blob)
    folders = {"org/sound": sound, "org/other": other}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(folders[name] / file))
    assert find_weights("hub:org/sound@main", known_sha256=None, title="it").path == sound / "model.safetensors"
    with pytest.raises(ConfigError, match=r"it: model\.safetensors: SHA-256 .*expected"):
        find_weights("hub:org/other", known_sha256=None, title="it")


# --- vision transformers ----------------------------------------------------------------------------------------------


def clip_pixel_values(images: Tensor, side: int) -> Tensor:
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    opened = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    return processor(opened, return_tensors="pt")["pixel_values"]


def test_clip_features_equal_transformers_with_its_processor(
    clip: tuple[CLIPFeatureExtractor, CLIPModel], images: Tensor
) -> None:
    ours, network = clip
    with torch.inference_mode():
        pooled = network.vision_model(pixel_values=clip_pixel_values(images, 48)).pooler_output
        expected = network.visual_projection(pooled)
    features = ours(images)
    assert features.shape == (5, 24)
    relative_error = (features - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(relative_error.max()) < 0.01
    assert float(torch.pdist(expected).min()) > 5 * float((features - expected).norm(dim=1).max())


@pytest.mark.parametrize("side", [32, 48, 64])
def test_a_resize_equals_pillow_within_one_grey_level(images: Tensor, side: int) -> None:
    resized = resize_shorter_side(images.float(), side)
    for ours, image in zip(resized, images.permute(0, 2, 3, 1).numpy(), strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_text_embeddings_equal_transformers(clip: tuple[CLIPFeatureExtractor, CLIPModel]) -> None:
    ours, network = clip
    texts = ["red", "blue square", "a"]
    tokens = CLIPTokenizer.from_pretrained(ours._folder)(texts, padding="max_length", max_length=12, return_tensors="pt")
    with torch.inference_mode():
        theirs = network.text_projection(
            network.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        )
    embeddings = ours.encode_text(texts)
    torch.testing.assert_close(embeddings, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.encode_text(texts[1:2])[0], embeddings[1])
    assert ours.encode_text(["red " * 40]).shape == (1, 24)
    assert ours.scale == pytest.approx(network.logit_scale.exp().item())


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_and_dinov2_give_the_class_token(kind: str, images: Tensor, tmp_path: Path) -> None:
    ours, network = make_vit(kind, tmp_path / kind)
    resize, side = {"dino": (54, 48), "dinov2": (224, 224)}[kind]
    assert (ours.resize, ours.side, ours.feature_dim) == (resize, side, 32)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    opened = [
        Image.fromarray(image).resize((resize, resize), Image.Resampling.BICUBIC)
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    start = (resize - side) // 2
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2).float()
    pixels = (stacked[..., start : start + side, start : start + side] / 255 - mean) / std
    with torch.inference_mode():
        theirs = network(pixel_values=pixels).last_hidden_state[:, 0]
    features = ours(images)
    assert float(((features - theirs).norm(dim=1) / theirs.norm(dim=1)).max()) < 0.01


def test_a_vits_features_are_the_same_bits_in_any_batch_at_its_row(
    clip: tuple[CLIPFeatureExtractor, CLIPModel], images: Tensor
) -> None:
    ours, _ = clip
    expected = ours(images)
    many = torch.cat([images.flip(0)] * 5)
    many[ours.BATCH_SIZE + 3] = images[3]
    assert torch.equal(ours(many)[ours.BATCH_SIZE + 3], expected[3])
    assert torch.equal(ours(images[[1, 1, 1, 3]])[3], expected[3])


def test_an_id_fixes_weights_resize_crop_normalization_and_dtype(
    clip: tuple[CLIPFeatureExtractor, CLIPModel], tmp_path: Path
) -> None:
    ours, _ = clip
    assert ours.id == (
        f"clip-vit-b-32:{file_sha256(ours._folder / 'pytorch_model.bin')[:16]}"
        "/resize=bicubic-antialias-levels-48/side=48/crop=centre/norm=clip/pool=projection/fp32"
    )
    other, _ = make_vit("dino", tmp_path / "dino")
    assert "/resize=bicubic-antialias-levels-54/side=48/crop=centre/norm=imagenet/pool=cls/fp32" in other.id


def test_the_published_vits_have_their_published_feature_dims() -> None:
    dims = {"clip-vit-b-32": 512, "clip-vit-l-14": 768, "dinov2-vit-b-14": 768, "dinov2-vit-l-14": 1024, "dino-vit-s-16": 384}
    assert {name: VIT_EXTRACTORS[name].feature_dim for name in dims} == dims
    assert all(spec.sha256 is None or len(spec.sha256) == 64 for spec in VIT_EXTRACTORS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("clip-vit-b-32", CLIPConfig()),
        ("dinov2-vit-b-14", Dinov2Config(image_size=518, patch_size=14)),
        ("dino-vit-s-16", ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)),
    ],
)
def test_a_vit_of_the_published_size_loads_from_a_file_of_the_published_layout(
    name: str, config: object, tmp_path: Path, images: Tensor
) -> None:
    network = {"clip": CLIPModel, "dinov2": Dinov2Model, "dino": ViTModel}[VIT_EXTRACTORS[name].kind](config)
    file = tmp_path / VIT_EXTRACTORS[name].file
    network.config.save_pretrained(tmp_path)
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    else:
        torch.save(network.state_dict(), file)
    extractor = make_extractor(name, weights={name: source_with_hash(tmp_path, file.name)})
    assert extractor(images[:2]).shape == (2, VIT_EXTRACTORS[name].feature_dim)


def test_weights_of_another_vit_are_refused(clip: tuple[CLIPFeatureExtractor, CLIPModel], tmp_path: Path) -> None:
    _, network = make_vit("dino", tmp_path / "dino")
    file = tmp_path / "dino" / "pytorch_model.bin"
    state = network.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "layernorm.weight" not in name}, file)
    with pytest.raises(ConfigError, match=r"no tensor layernorm\.weight; these are weights of another network"):
        make_extractor("dino-vit-s-16", weights={"dino-vit-s-16": source_with_hash(tmp_path / "dino", file.name)})
    torch.save({**state, "layernorm.weight": torch.ones(5)}, file)
    with pytest.raises(ConfigError, match=r"layernorm\.weight has shape \[5\], not \[32\]"):
        make_extractor("dino-vit-s-16", weights={"dino-vit-s-16": source_with_hash(tmp_path / "dino", file.name)})
    (tmp_path / "dino" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        make_extractor("dino-vit-s-16", weights={"dino-vit-s-16": source_with_hash(tmp_path / "dino", file.name)})


# --- weights ----------------------------------------------------------------------------------------------------------


class MaliciousPickle:
    """An object whose unpickling fails the test."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, ...]]:
        return (run_by_pickle, ("loaded",))


def run_by_pickle(_: str) -> None:
    raise AssertionError("a pickle was run")


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_a_truncated_weights_file_gives_one_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    tensors = {"a": torch.ones(2000)}
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    content = file.read_bytes()
    for length in (len(content) - 100, len(content) // 2, 5, 0):
        file.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r": truncated or|refused") as refused:
            read_tensors(file)
        assert "\n" not in str(refused.value)
    file.write_bytes(content)
    assert torch.equal(read_tensors(file)["a"], tensors["a"])


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    for name, write in {
        "plain.pth": lambda file: file.write_bytes(pickle.dumps(MaliciousPickle())),
        "inside.pth": lambda file: torch.save({"a": MaliciousPickle()}, file),
        "named.safetensors": lambda file: file.write_bytes(pickle.dumps(MaliciousPickle())),
    }.items():
        write(tmp_path / name)
        with pytest.raises(ConfigError, match="refused") as refused:
            read_tensors(tmp_path / name)
        assert "\n" not in str(refused.value)
    torch.save({"epoch": 3, "state": {"a": torch.ones(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ConfigError, match="not a plain dictionary of tensors"):
        read_tensors(tmp_path / "nested.pth")


def test_a_source_of_unknown_hash_must_state_it(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3)}, file)
    sha256 = file_sha256(file)
    with pytest.raises(ConfigError, match=f"if you trust weights.safetensors, give .*#sha256={sha256}$"):
        find_weights(str(file), known_sha256=None, title="it")
    assert find_weights(f"{file}#sha256={sha256.upper()}", known_sha256=None, title="it").sha256 == sha256
    with pytest.raises(ConfigError, match=f"expected ffffffffffffffff.*#sha256={sha256}"):
        find_weights(str(file), known_sha256="f" * 64, title="it")
    with pytest.raises(ConfigError, match="no such weights file"):
        find_weights(str(tmp_path / "absent.pth"), known_sha256=None, title="it")


def test_a_url_is_downloaded_once_and_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def download(url: str, path: str, progress: bool) -> None:
        downloads.append(url)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    sha256 = "9b7f5d0ef67f6d5e9f9b3fdc1ac8c4d9b1b3ecf0d8a0ad1d8a84a1c3f67a0a30"
    with pytest.raises(ConfigError, match="expected 9b7f5d0ef67f6d5e"):
        find_weights("https://example.org/w.pth", known_sha256=sha256, title="it")
    file = tmp_path / "checkpoints" / "w.pth"
    assert find_weights("https://example.org/w.pth", known_sha256=file_sha256(file), title="it").path == file
    assert downloads == ["https://example.org/w.pth"]
    assert list(file.parent.iterdir()) == [file]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "grey"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "RGBA"),
        (torch.full((2, 3, 8, 8), torch.nan), "2 images contain NaN"),
        (torch.zeros(2, 3, 8, 8), "float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[3, 8, 8\]"),
    ],
    ids=["grey", "rgba", "nan", "float", "single image"],
)
def test_inputs_other_than_byte_images_give_one_line(images: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        check_images(images)
    assert "\n" not in str(refused.value)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def unit(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = vgg16(weights=None).features
    save_file({f"features.{name}": tensor.contiguous() for name, tensor in features.state_dict().items()}, file)
    return file


@pytest.mark.slow
def test_lpips_on_vgg_equals_the_package_with_the_same_weights(vgg_file: Path, images: Tensor) -> None:
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    weights = load_file(vgg_file)
    theirs.net.load_state_dict({name: weights["features." + name.partition(".")[2]] for name in theirs.net.state_dict()})
    a, b = unit(images[:2]), unit(images[2:4])
    ours = load_lpips(vgg_file, network="vgg")
    with torch.inference_mode():
        torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lpips_of_maps(ours.maps(a), ours.maps(b), "vgg"), ours(a, b), rtol=1e-5, atol=1e-8)
    assert ours.id.startswith("lpips-0.1-vgg:")
    assert float(ours(a, b).min()) > 0


def test_lpips_from_maps_equals_lpips_with_trained_weights(shared: Path, images: Tensor) -> None:
    ours = load_lpips(shared / "lpips" / "alexnet.safetensors")
    a, b = unit(images[:2]), unit(images[2:4])
    torch.testing.assert_close(lpips_of_maps(ours.maps(a), ours.maps(b)), ours(a, b), rtol=1e-5, atol=1e-8)
