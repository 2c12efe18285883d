"""On a CUDA device: passes that are played back give what plain passes give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.errors import ConfigError
from isocost.models.cuda_graph import CudaGraphModule
from isocost.models.dit import build_dit
from isocost.models.unet import build_unet
from isocost.training.throughput_estimate import RandomTask
from isocost.training.trainer import Trainer, make_accelerator

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
MODEL = ModelSpec(width=8, latent_channels=4, latent_size=8, cross_attention_dim=16)


def inputs(seed: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    return x.cuda(), (torch.rand(rows) * 999).cuda(), torch.randn(rows, 5, 16).cuda()


@needs_cuda
@pytest.mark.parametrize("network", [build_unet(MODEL), build_dit(MODEL.model_copy(update={"kind": "dit", "width": 32}))])
def test_a_pass_played_back_has_the_bits_of_a_plain_one(network: nn.Module) -> None:
    network = network.cuda().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # a fresh transformer says zero
    graphed = CudaGraphModule(network)
    with torch.inference_mode():
        for seed, rows in ((0, 6), (1, 6), (2, 3), (3, 6)):
            given = inputs(seed, rows)
            assert torch.equal(graphed(*given).sample, network(*given).sample)
        first, second = graphed(*inputs(4)).sample, graphed(*inputs(5)).sample
        assert not torch.equal(first, second), "an output is the caller's to keep"
    assert len(graphed.recorded) == 2


def trained(folder: Path, **changes: object) -> list[Tensor]:
    spec = TrainSpec(num_images=64, batch_size=8, lr=1e-3, dtype="fp32", **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = build_unet(MODEL)
    trainer = Trainer(spec, RandomTask(MODEL, 5), network, folder, make_accelerator(spec, folder, "test"))
    if spec.cuda_graphs:
        trainer.record(0)
    for step in range(4):
        torch.manual_seed(step)
        trainer.step(trainer.batch(step * 8), step * 8)
    return [parameter.detach().cpu() for parameter in network.parameters()]


@needs_cuda
@pytest.mark.parametrize("microbatch", [8, 4])
def test_a_training_played_back_learns_what_a_plain_one_learns(tmp_path: Path, microbatch: int) -> None:
    torch.manual_seed(0)
    before = [parameter.detach().clone() for parameter in build_unet(MODEL).parameters()]
    plain = trained(tmp_path / "plain", microbatch=microbatch)
    graphed = trained(tmp_path / "graphed", microbatch=microbatch, cuda_graphs=True)
    moved = sum(float((a - b).square().sum()) for a, b in zip(plain, before, strict=True)) ** 0.5
    apart = sum(float((a - b).square().sum()) for a, b in zip(plain, graphed, strict=True)) ** 0.5
    assert moved > 0
    assert apart < 0.05 * moved, "kernels add in no fixed order; the steps are the same"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_graphs_without_a_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs: for one process with a CUDA device"):
        trained(tmp_path, cuda_graphs=True)
