"""The probe: a small classifier, trained on labelled real pictures, that reads labels back from generated ones.

Legend: N pictures, B batch, H x W pixels, A label heads, C channels. Labels are int64 [N, A]: class of each head.
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

from isocost.errors import RequestError

BATCH_SIZE = 128
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.05
WARMUP_SHARE = 0.2


class Probe:
    """A fitted classifier of one or several heads; made by `fit_probe` or `Probe.load`."""

    def __init__(self, network: ProbeNetwork, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(self, pictures: Tensor) -> Tensor:
        """The likeliest class of every head: uint8 [N, 3, H, W] to int64 [N, A] on the CPU."""
        _check_pictures(pictures, self.network.side)
        classes = [
            torch.stack([logits.argmax(1) for logits in self.network(_prepare(batch, self.device))], 1).cpu()
            for batch in pictures.split(2 * BATCH_SIZE)
        ]
        return torch.cat(classes)

    def accuracy(self, pictures: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Share of pictures that each head gets right, [A]."""
        return self._matches(pictures, labels).mean(0)

    def alignment(self, pictures: Tensor, labels: Tensor) -> NDArray[np.float64]:
        """Share of all heads that read the label back, by picture: [N]."""
        return self._matches(pictures, labels).mean(1)

    def _matches(self, pictures: Tensor, labels: Tensor) -> NDArray[np.float64]:
        _check_labels(labels, len(pictures), self.network.num_classes)
        return (self.predict(pictures) == labels.cpu()).double().numpy()

    def save(self, folder: str | Path) -> None:
        """Write `probe.safetensors` and `probe.json` into `folder`, made where absent."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.network.state_dict().items()}
        save_file(state, target / "probe.safetensors")
        plain = {"side": self.network.side, "num_classes": list(self.network.num_classes)}
        (target / "probe.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Probe:
        """Read what `save` wrote.

        Raises:
            RequestError: the folder holds no probe.
        """
        source = Path(folder)
        for name in ("probe.json", "probe.safetensors"):
            if not (source / name).is_file():
                raise RequestError(f"{source}: no {name}; a probe's folder is written by Probe.save")
        plain = json.loads((source / "probe.json").read_text(encoding="utf-8"))
        network = ProbeNetwork(plain["side"], plain["num_classes"])
        network.load_state_dict(load_file(source / "probe.safetensors"), strict=True)
        return cls(network, device)


def fit_probe(
    pictures: Tensor,
    labels: Tensor,
    num_classes: Sequence[int],
    *,
    num_epochs: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probe:
    """Train a probe on uint8 [N, 3, H, W] with labels int64 [N, A]; head a has `num_classes[a]` classes.

    Cross-entropy summed over heads, AdamW, one-cycle learning rate. The result is a function of the arguments and of the
    number of threads. Pictures are not augmented: attributes such as side or colour would not survive it.

    Raises:
        RequestError: the side is no multiple of 16, labels do not fit, or there are fewer pictures than one batch.
    """
    _check_pictures(pictures, pictures.shape[-1])
    _check_labels(labels, len(pictures), num_classes)
    if len(pictures) < BATCH_SIZE:
        raise RequestError(f"{len(pictures)} pictures are too few for a probe; it trains on batches of {BATCH_SIZE}")
    place = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ProbeNetwork(pictures.shape[-1], num_classes)
    network.to(place, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    batches_per_epoch = len(pictures) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=num_epochs * batches_per_epoch, pct_start=WARMUP_SHARE
    )
    shuffle = torch.Generator().manual_seed(seed)
    pictures, labels = pictures.to(place), labels.to(place)
    for _ in range(num_epochs):
        order = torch.randperm(len(pictures), generator=shuffle).to(place)
        for rows in order[: batches_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
            logits = network(_prepare(pictures[rows], place))
            loss = torch.stack([functional.cross_entropy(one, labels[rows, head]) for head, one in enumerate(logits)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return Probe(network, place)


class ProbeNetwork(nn.Module):
    """Strided stem to a 16 x 16 map of 32 channels, 8 x 8 of 64 with a residual block, 4 x 4 of 128, and linear heads on it.

    The heads see where things are, since labels such as "left" ask for it. The stem's stride grows with the side, so the
    cost of a picture hardly depends on it.
    """

    def __init__(self, side: int, num_classes: Sequence[int]) -> None:
        super().__init__()
        if side < 32 or side % 16:
            raise RequestError(f"a probe sees square pictures whose side is a multiple of 16, at least 32; not {side}")
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

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [-1, 1] to logits, one [B, num_classes[a]] for each head."""
        features = self.body(pictures)
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


def _prepare(pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1] on `device`."""
    return (pictures.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _check_pictures(pictures: Tensor, side: int) -> None:
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (3, side, side):
        raise RequestError(f"a probe needs uint8 [N, 3, {side}, {side}], not {pictures.dtype} {list(pictures.shape)}")


def _check_labels(labels: Tensor, num_pictures: int, num_classes: Sequence[int]) -> None:
    if labels.shape != (num_pictures, len(num_classes)):
        raise RequestError(f"labels must be [{num_pictures}, {len(num_classes)}], one column a head, not {list(labels.shape)}")
    for head, count in enumerate(num_classes):
        low, high = int(labels[:, head].min()), int(labels[:, head].max())
        if low < 0 or high >= count:
            raise RequestError(f"head {head}: labels run from {low} to {high}, but its classes are 0 to {count - 1}")
