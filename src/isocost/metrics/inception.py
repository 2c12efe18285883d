"""The Inception-v3 network of FID, KID and the Inception score, as torch-fidelity implements it: 2048 features per image.

Shapes: N images, H x W pixels, D = 2048 features, L = 1008 logits.
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
    antialiasing) and scaled by (x - 128) / 128. Features are the output of the average pool before the last layer.
    """

    BATCH_SIZE = 16
    feature_dim = 2048

    def __init__(self, weights: str = URL, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            weights: a source as in `isocost.metrics.download`; by default torch-fidelity's own URL.
            device: where the network runs.

        Raises:
            ConfigError: torch-fidelity is not installed, the weights cannot be loaded, or they are another file.
        """
        try:
            from torch_fidelity import feature_extractor_inceptionv3
        except ModuleNotFoundError as error:
            raise ConfigError("Inception features need torch-fidelity: pip install torch-fidelity==0.4.0") from error
        file = find_weights(weights, known_sha256=SHA256, title="inception")
        network_class = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        # The class downloads its weights or unpickles a file; both are disabled, and safely read tensors are loaded below.
        with (
            mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", return_value={}),
            mock.patch.object(network_class, "load_state_dict", return_value=None),
            torch.random.fork_rng(devices=[]),
        ):
            network = network_class("inception-v3-compat", [str(self.feature_dim)], verbose=False)
        load_into(network, read_tensors(file.path), file.path)
        self.device = torch.device(device)
        self._network = network.to(self.device)
        self.id = (
            f"inception-v3-fid:{file.sha256[:16]}/resize=bilinear-tf1-float/side=299/crop=none/norm=(x-128)÷128/pool=2048/fp32"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, 2048] of images uint8 [N, 3, H, W], in fixed batches (`run_in_batches`)."""
        return run_in_batches(
            images,
            lambda batch: self._network(batch)[0],
            batch_size=self.BATCH_SIZE,
            feature_dim=self.feature_dim,
            device=self.device,
        )

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Class logits without bias, [N, 1008], from features [N, 2048], for the Inception score."""
        return np.asarray(features, dtype=np.float64) @ self._network.fc.weight.cpu().double().numpy().T
