"""The attribute classifier: a small network, trained on labelled real images, that predicts labels of generated images.

Shapes: N images, B images per batch, H x W pixels, A label heads, C channels. Labels are int64 [N, A]: the class per head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from isocost.errors import ConfigError, RunError
from isocost.utils.artifact_store import remedy
from isocost.utils.tensor_files import read_tensors

BATCH_SIZE = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.2
WEIGHTS_FILE, CONFIG_FILE = "classifier.safetensors", "classifier.json"


class AttributeClassifier:
    """A trained classifier with one or several heads; create it with `train_attribute_classifier` or `load`."""

    def __init__(self, network: AttributeClassifierNetwork, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Predict the most probable class of every head, int64 [N, A] on the CPU, for images uint8 [N, 3, H, W].

        Raises:
            ConfigError: the images have another type or size.
        """
        _check_images(images, self.network.side)
        classes = [
            torch.stack([logits.argmax(1) for logits in self.network(_prepare(batch, self.device))], 1).cpu()
            for batch in images.split(2 * BATCH_SIZE)
        ]
        return torch.cat(classes)

    def accuracy(self, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Fraction of images that each head classifies correctly, [A].

        Raises:
            ConfigError: images or labels do not fit.
        """
        return self._matches(images, labels).mean(0)

    def alignment(self, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Fraction of heads that predict the given label, per image: [N].

        Raises:
            ConfigError: images or labels do not fit.
        """
        return self._matches(images, labels).mean(1)

    def _matches(self, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
        _check_labels(labels, len(images), self.network.num_classes)
        return (self.predict(images) == labels.cpu()).double().numpy()

    def save(self, folder: str | Path) -> None:
        """Write `classifier.safetensors` and `classifier.json` into `folder`, which is created if missing."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.network.state_dict().items()}
        save_file(state, path / WEIGHTS_FILE)
        config = {"side": self.network.side, "num_classes": list(self.network.num_classes)}
        (path / CONFIG_FILE).write_text(json.dumps(config) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> AttributeClassifier:
        """Load a classifier that `save` wrote.

        Raises:
            ConfigError: the folder has no attribute classifier.
            RunError: a file is damaged.
        """
        path = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / name).is_file():
                raise ConfigError(f"{path}: no {name}; give a folder that AttributeClassifier.save wrote")
        weights = read_tensors(path / WEIGHTS_FILE)
        try:
            config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
            network = AttributeClassifierNetwork(config["side"], config["num_classes"])
            network.load_state_dict(weights, strict=True)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise RunError(f"{path}: the attribute classifier is damaged; {remedy(path)}") from error
        return cls(network, device)


def train_attribute_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: Sequence[int],
    *,
    num_epochs: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttributeClassifier:
    """Train an attribute classifier with cross-entropy summed over heads, AdamW and a one-cycle learning rate.

    The result depends on the arguments and on the number of threads only. Images are not augmented, because augmentation
    would change attributes such as position or colour.

    Args:
        images: uint8 [N, 3, H, W] with H = W.
        labels: int64 [N, A].
        num_classes: number of classes of each head, A values.
        num_epochs: passes over the images.
        seed: of the initial weights and the order of images.
        device: where the network is trained.

    Raises:
        ConfigError: the image size is not a multiple of 16, labels do not fit, or there are fewer images than one batch.
    """
    _check_images(images, images.shape[-1])
    _check_labels(labels, len(images), num_classes)
    if len(images) < BATCH_SIZE:
        raise ConfigError(
            f"{len(images)} images are too few to train an attribute classifier; give at least one batch of {BATCH_SIZE}"
        )
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AttributeClassifierNetwork(images.shape[-1], num_classes)
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    batches_per_epoch = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=num_epochs * batches_per_epoch, pct_start=WARMUP_FRACTION
    )
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    for _ in range(num_epochs):
        order = torch.randperm(len(images), generator=shuffle).to(device)
        for rows in order[: batches_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            logits_by_head = network(_prepare(images[rows], device))
            loss = torch.stack(
                [functional.cross_entropy(logits, labels[rows, head]) for head, logits in enumerate(logits_by_head)]
            ).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return AttributeClassifier(network, device)


class AttributeClassifierNetwork(nn.Module):
    """A convolutional network with linear heads on its last feature map.

    A strided stem gives a 16 x 16 map with 32 channels. Then follow 8 x 8 with 64 channels and a residual block, and 4 x 4
    with 128 channels. The heads see the flattened map, not its mean, because labels such as "left" depend on position. The
    stride of the stem grows with the image size, so the cost per image hardly depends on that size.
    """

    def __init__(self, side: int, num_classes: Sequence[int]) -> None:
        super().__init__()
        if side < 32 or side % 16:
            raise ConfigError(f"the attribute classifier needs an image size of at least 32, a multiple of 16; not {side}")
        self.side = side
        self.num_classes = tuple(num_classes)
        stride = side // 16
        self.body = nn.Sequential(
            *_convolution(3, 32, 2 * stride, stride, padding=stride // 2),
            *_convolution(32, 64, 3, 2),
            Residual(64),
            *_convolution(64, 128, 3, 2),
            nn.Flatten(),
        )
        self.heads = nn.ModuleList(nn.Linear(128 * 4 * 4, count) for count in self.num_classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits [B, num_classes[a]] of each head a for images float [B, 3, H, W] in [-1, 1]."""
        features = self.body(images)
        return [head(features) for head in self.heads]


class Residual(nn.Module):
    """x plus two 3 x 3 convolutions of x; input and output [B, C, H, W]."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_convolution(num_channels, num_channels), *_convolution(num_channels, num_channels)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.inner(x))


def _convolution(num_in: int, num_out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(num_out), nn.ReLU()]


def _prepare(images: Tensor, device: torch.device) -> Tensor:
    """Images uint8 [B, 3, H, W] as float32 in [-1, 1] on `device`."""
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _check_images(images: Tensor, side: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise ConfigError(
            f"the attribute classifier needs uint8 [N, 3, {side}, {side}], not {images.dtype} {list(images.shape)}"
        )


def _check_labels(labels: Tensor, num_images: int, num_classes: Sequence[int]) -> None:
    if labels.shape != (num_images, len(num_classes)):
        raise ConfigError(f"labels must be [{num_images}, {len(num_classes)}], one column per head, not {list(labels.shape)}")
    for head, count in enumerate(num_classes):
        low, high = int(labels[:, head].min()), int(labels[:, head].max())
        if low < 0 or high >= count:
            raise ConfigError(f"head {head}: labels run from {low} to {high}, but its classes are 0 to {count - 1}")
