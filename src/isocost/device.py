"""Where networks run when nobody says."""

from __future__ import annotations

import os

import torch


def best_device() -> torch.device:
    """A CUDA device where there is one - under torchrun the one of this process - and else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
