"""The probe: a small classifier, trained on labelled real images, that reads labels back from generated ones.

Legend: N images, B batch, H x W pixels, A label heads, C channels. Labels are int64 [N, A]: class of each head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isocost.errors import ConfigError

BATCH_SIZE = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.2


class AttributeClassifier:
    """A fitted classifier of one or several heads; made by `train_attribute_classifier` or `Probe.load`."""

    def __init__(self, network: AttributeClassifierNetwork, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """The likeliest class of every head: uint8 [N, 3, H, W] to int64 [N, A] on the CPU."""
        _check_images(images, self.network.side)
        classes = [
            torch.stack([logits.argmax(1) for logits in self.network(_prepare(batch, self.device))], 1).cpu()
            for batch in images.split(2 * BATCH_SIZE)
        ]
        return torch.cat(classes)

    def accuracy(self, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Share of images that each head gets right, [A]."""
        return self._matches(images, labels).mean(0)

    def alignment(self, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Share of all heads that read the label back, by image: [N]."""
        return self._matches(images, labels).mean(1)

    def _matches(self, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
        _check_labels(labels, len(images), self.network.num_classes)
        return (self.predict(images) == labels.cpu()).double().numpy()

    def save(self, folder: str | Path) -> None:
        """Write `probe.safetensors` and `probe.json` into `folder`, made where absent."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.network.state_dict().items()}
        save_file(state, target / "probe.safetensors")
        plain = {"side": self.network.side, "num_classes": list(self.network.num_classes)}
        (target / "probe.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> AttributeClassifier:
        """Read what `save` wrote.

        Raises:
            ConfigError: the folder holds no probe.
        """
        source = Path(folder)
        for name in ("probe.json", "probe.safetensors"):
            if not (source / name).is_file():
                raise ConfigError(f"{source}: no {name}; a probe's folder is written by Probe.save")
        plain = json.loads((source / "probe.json").read_text(encoding="utf-8"))
        network = AttributeClassifierNetwork(plain["side"], plain["num_classes"])
        network.load_state_dict(load_file(source / "probe.safetensors"), strict=True)
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
    """Train a probe on uint8 [N, 3, H, W] with labels int64 [N, A]; head a has `num_classes[a]` classes.

    Cross-entropy summed over heads, AdamW, one-cycle learning rate. The result is a function of the arguments and of the
    number of threads. Images are not augmented: attributes such as side or colour would not survive it.

    Raises:
        ConfigError: the side is no multiple of 16, labels do not fit, or there are fewer images than one batch.
    """
    _check_images(images, images.shape[-1])
    _check_labels(labels, len(images), num_classes)
    if len(images) < BATCH_SIZE:
        raise ConfigError(f"{len(images)} images are too few for a probe; it trains on batches of {BATCH_SIZE}")
    place = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AttributeClassifierNetwork(images.shape[-1], num_classes)
    network.to(place, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    batches_per_epoch = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=num_epochs * batches_per_epoch, pct_start=WARMUP_FRACTION
    )
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = images.to(place), labels.to(place)
    for _ in range(num_epochs):
        order = torch.randperm(len(images), generator=shuffle).to(place)
        for rows in order[: batches_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            logits = network(_prepare(images[rows], place))
            loss = torch.stack([functional.cross_entropy(one, labels[rows, head]) for head, one in enumerate(logits)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return AttributeClassifier(network, place)


class AttributeClassifierNetwork(nn.Module):
    """Strided stem to a 16 x 16 map of 32 channels, 8 x 8 of 64 with a residual block, 4 x 4 of 128, and linear heads on it.

    The heads see where things are, since labels such as "left" ask for it. The stem's stride grows with the side, so the
    cost of an image hardly depends on it.
    """

    def __init__(self, side: int, num_classes: Sequence[int]) -> None:
        super().__init__()
        if side < 32 or side % 16:
            raise ConfigError(f"a probe sees square images whose side is a multiple of 16, at least 32; not {side}")
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
        """float [B, 3, H, W] in [-1, 1] to logits, one [B, num_classes[a]] for each head."""
        features = self.body(images)
        return [head(features) for head in self.heads]


class Residual(nn.Module):
    """x + two 3 x 3 convolutions of x, [B, C, H, W] to the same."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_convolution(num_channels, num_channels), *_convolution(num_channels, num_channels)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.inner(x))


def _convolution(num_in: int, num_out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(num_out), nn.ReLU()]


def _prepare(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1] on `device`."""
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _check_images(images: Tensor, side: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side):
        raise ConfigError(f"a probe needs uint8 [N, 3, {side}, {side}], not {images.dtype} {list(images.shape)}")


def _check_labels(labels: Tensor, num_images: int, num_classes: Sequence[int]) -> None:
    if labels.shape != (num_images, len(num_classes)):
        raise ConfigError(f"labels must be [{num_images}, {len(num_classes)}], one column a head, not {list(labels.shape)}")
    for head, count in enumerate(num_classes):
        low, high = int(labels[:, head].min()), int(labels[:, head].max())
        if low < 0 or high >= count:
            raise ConfigError(f"head {head}: labels run from {low} to {high}, but its classes are 0 to {count - 1}")
