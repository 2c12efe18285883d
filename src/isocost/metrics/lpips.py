"""LPIPS, a perceptual distance of two images, from the convolutions of AlexNet or VGG16 and the heads of the lpips package.

Shapes: N pairs of images, H x W pixels, C channels of a feature map, h x w its positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isocost.errors import ConfigError
from isocost.metrics.download import tensors_sha256
from isocost.metrics.preprocessing import exact_fp32

LpipsNetwork = Literal["alex", "vgg"]
_TITLES = {"alex": "AlexNet", "vgg": "VGG16"}


class Lpips:
    """LPIPS 0.1 (arXiv 1801.03924, eq. 1); create it with `load_lpips`."""

    def __init__(self, network: Any, name: LpipsNetwork, weights_sha256: str, device: torch.device) -> None:
        self.id = f"lpips-0.1-{name}:{weights_sha256[:16]}/fp32"
        self._network = network
        self._device = device

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances float32 [N] of N pairs of images, both float [N, 3, H, W] in [-1, 1]; differentiable."""
        with exact_fp32(self._device):
            return self._network(a.to(self._device).float(), b.to(self._device).float()).flatten()

    @torch.inference_mode()
    def maps(self, images: Tensor) -> list[Tensor]:
        """The five feature maps that LPIPS compares, each [N, C, h, w], of images float [N, 3, H, W] in [-1, 1]."""
        with exact_fp32(self._device):
            return list(self._network.net(self._network.scaling_layer(images.to(self._device).float())))


def load_lpips(
    weights: str | Path | None = None, device: torch.device | str = "cpu", *, network: LpipsNetwork = "alex"
) -> Lpips:
    """Load LPIPS with the heads of the lpips package, version 0.1, and ImageNet convolutions of AlexNet or VGG16.

    Args:
        weights: a safetensors file with the convolutions under torchvision's names (`features.0.weight`, ...). By default
            torchvision's IMAGENET1K_V1 is taken from its cache, or downloaded and checked against the hash in its name.
        device: where the network runs.
        network: "alex" (AlexNet) or "vgg" (VGG16).

    Raises:
        ConfigError: the file is missing, truncated or lacks a tensor, or torchvision's weights cannot be loaded.
    """
    tensors = _torchvision_weights(network) if weights is None else _read_weights(Path(weights), _TITLES[network])
    lpips_network = _package_network(network)
    torchvision_names = {name: "features." + name.partition(".")[2] for name in lpips_network.net.state_dict()}
    absent = sorted(set(torchvision_names.values()) - set(tensors))
    if absent:
        raise ConfigError(f"{weights}: no tensor {absent[0]}; expected {_TITLES[network]} under torchvision's names")
    convolutions = {name: tensors[torchvision_name] for name, torchvision_name in torchvision_names.items()}
    for name, tensor in lpips_network.net.state_dict().items():
        if tensor.shape != convolutions[name].shape:
            mismatch = f"{torchvision_names[name]} is {list(convolutions[name].shape)}, not {list(tensor.shape)}"
            raise ConfigError(f"{weights}: {mismatch}; expected torchvision's {_TITLES[network]}")
    lpips_network.net.load_state_dict(convolutions, strict=True)
    lpips_network.requires_grad_(False).eval().to(device)
    return Lpips(lpips_network, network, tensors_sha256(convolutions), torch.device(device))


@torch.inference_mode()
def lpips_of_maps(a: Sequence[Tensor], b: Sequence[Tensor], network: LpipsNetwork = "alex") -> Tensor:
    """LPIPS from given feature maps, with the heads of the lpips package; needs no convolution weights.

    Args:
        a: the five feature maps of N images (`Lpips.maps`), each [N, C, h, w].
        b: those of their counterparts.
        network: the network that made the maps.

    Returns:
        float32 [N].
    """
    heads = _package_network(network).eval().lins
    distances = torch.zeros(len(a[0]))
    for map_a, map_b, head in zip(a, b, heads, strict=True):
        unit_a, unit_b = (maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10) for maps in (map_a.float(), map_b.float()))
        distances += head((unit_a - unit_b).square()).mean((1, 2, 3))
    return distances


def _package_network(network: LpipsNetwork) -> Any:
    """The network of the lpips package with trained heads and randomly initialised convolutions."""
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # lpips 0.1.4 calls torchvision with names that torchvision has since replaced.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net=network, pretrained=True, pnet_rand=True, verbose=False)


def _read_weights(file: Path, title: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give the {title} weights as safetensors, or omit it for torchvision's")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a safetensors file ({error}); pickled weights are refused, use safetensors") from error


def _torchvision_weights(network: LpipsNetwork) -> Mapping[str, Tensor]:
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = {"alex": AlexNet_Weights, "vgg": VGG16_Weights}[network].IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision's {_TITLES[network]} weights cannot be loaded ({error}); give them as a safetensors file"
        ) from error
