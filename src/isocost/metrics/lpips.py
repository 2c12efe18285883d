"""LPIPS: how different two images look, by the convolutions of AlexNet or VGG16 and the heads of the lpips package.

Legend: N pairs of images, H x W pixels, C channels of a map, h x w its places.
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
    """LPIPS 0.1 (arXiv 1801.03924, eq. 1); made by `load_lpips`."""

    def __init__(self, network: Any, name: LpipsNetwork, weights_sha256: str, device: torch.device) -> None:
        self.id = f"lpips-0.1-{name}:{weights_sha256[:16]}/fp32"
        self._network = network
        self._device = device

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of images in pairs: float [N, 3, H, W] in [-1, 1], twice, to float32 [N]; differentiable."""
        with exact_fp32(self._device):
            return self._network(a.to(self._device).float(), b.to(self._device).float()).flatten()

    @torch.inference_mode()
    def maps(self, images: Tensor) -> list[Tensor]:
        """The five maps that are compared, each [N, C, h, w], of float [N, 3, H, W] in [-1, 1]."""
        with exact_fp32(self._device):
            return list(self._network.net(self._network.scaling_layer(images.to(self._device).float())))


def load_lpips(
    weights: str | Path | None = None, device: torch.device | str = "cpu", *, network: LpipsNetwork = "alex"
) -> Lpips:
    """LPIPS with the package's own heads, version 0.1, and the ImageNet convolutions of AlexNet or VGG16.

    `weights` is a safetensors file with the convolutions under torchvision's names (`features.0.weight`, ...); where it is
    None they are torchvision's IMAGENET1K_V1, from its cache or downloaded and checked against the hash in its name.

    Raises:
        ConfigError: the file is missing, cut short or lacks a tensor, or torchvision's weights cannot be had.
    """
    tensors = _torchvision(network) if weights is None else _read(Path(weights), _TITLES[network])
    heads = _package_network(network)
    names = {name: "features." + name.partition(".")[2] for name in heads.net.state_dict()}
    absent = sorted(set(names.values()) - set(tensors))
    if absent:
        raise ConfigError(f"{weights}: no tensor {absent[0]}; expected {_TITLES[network]} under torchvision's names")
    convolutions = {name: tensors[source] for name, source in names.items()}
    for name, tensor in heads.net.state_dict().items():
        if tensor.shape != convolutions[name].shape:
            found = f"{names[name]} is {list(convolutions[name].shape)}, not {list(tensor.shape)}"
            raise ConfigError(f"{weights}: {found}; expected torchvision's {_TITLES[network]}")
    heads.net.load_state_dict(convolutions, strict=True)
    heads.requires_grad_(False).eval().to(device)
    return Lpips(heads, network, tensors_sha256(convolutions), torch.device(device))


@torch.inference_mode()
def lpips_of_maps(a: Sequence[Tensor], b: Sequence[Tensor], network: LpipsNetwork = "alex") -> Tensor:
    """LPIPS from the maps of images in pairs ([N, C, h, w] at five depths, twice), by the package's heads: float32 [N].

    The convolutions are left out, so it needs no weights beyond the package's.
    """
    heads = _package_network(network).eval()
    metrics = torch.zeros(len(a[0]))
    for one, other, head in zip(a, b, heads.lins, strict=True):
        unit_a, unit_b = (maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10) for maps in (one.float(), other.float()))
        metrics += head((unit_a - unit_b).square()).mean((1, 2, 3))
    return metrics


def _package_network(network: LpipsNetwork) -> Any:
    """The package's network: trained heads, convolutions that nobody trained."""
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # lpips 0.1.4 calls torchvision with names that torchvision has since replaced.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net=network, pretrained=True, pnet_rand=True, verbose=False)


def _read(file: Path, title: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give the {title} weights as safetensors, or none to use torchvision's")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a safetensors file ({error}); pickled weights are refused") from error


def _torchvision(network: LpipsNetwork) -> Mapping[str, Tensor]:
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    listed = {"alex": AlexNet_Weights, "vgg": VGG16_Weights}[network].IMAGENET1K_V1
    try:
        return listed.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision's {_TITLES[network]} weights cannot be had ({error}); give them as a safetensors file"
        ) from error
