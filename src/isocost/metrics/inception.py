"""Inception as FID, KID and the Inception score know it: torch-fidelity's network, 2048 features an image.

Legend: N images, H x W pixels, D = 2048 features, L = 1008 logits.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.errors import ConfigError
from isocost.metrics.download import find_weights, load_into, read_tensors
from isocost.metrics.preprocessing import run_in_batches

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Inception:
    """The Inception-v3 of the TensorFlow graph of 2015-12-05 (arXiv 1706.08500), in float32.

    Images are resized to 299 x 299 in floating point as TensorFlow 1.x did (bilinear, corners not aligned, no
    antialiasing) and scaled by (x - 128) / 128. Features are the pool before the last layer.

    Raises:
        ConfigError: torch-fidelity is not installed, or the weights cannot be had or are another file.
    """

    BUCKET = 16
    width = 2048

    def __init__(self, weights: str = URL, device: torch.device | str = "cpu") -> None:
        """`weights` is a place as in `isocost.metrics.weights`; by default torch-fidelity's own URL."""
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as source
        except ModuleNotFoundError as error:
            raise ConfigError("Inception features need torch-fidelity: pip install torch-fidelity==0.4.0") from error
        file = find_weights(weights, known_sha256=SHA256, title="inception")
        # The class takes its weights from a URL or unpickles a file; here it gets tensors that were read safely.
        with (
            mock.patch.object(source, "load_state_dict_from_url", return_value={}),
            mock.patch.object(source.FeatureExtractorInceptionV3, "load_state_dict", return_value=None),
            torch.random.fork_rng(devices=[]),
        ):
            network = source.FeatureExtractorInceptionV3("inception-v3-compat", [str(self.width)], verbose=False)
        load_into(network, read_tensors(file.path), file.path)
        self.device = torch.device(device)
        self._network = network.to(self.device)
        self.id = (
            f"inception-v3-fid:{file.sha256[:16]}/resize=bilinear-tf1-float/side=299/crop=none/norm=(x-128)÷128/pool=2048/fp32"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] to float32 [N, 2048], in buckets (`run_in_batches`)."""
        return run_in_batches(
            images, lambda rows: self._network(rows)[0], bucket=self.BUCKET, width=self.width, device=self.device
        )

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Class logits without bias, [N, 1008], from features [N, 2048]: what the Inception score takes."""
        return np.asarray(features, dtype=np.float64) @ self._network.fc.weight.cpu().double().numpy().T
