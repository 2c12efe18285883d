"""CUDA graphs: replayed passes and training steps equal ordinary ones."""

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
from isocost.training.throughput_estimate import RandomObjective
from isocost.training.trainer import Trainer, make_accelerator

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
MODEL = ModelSpec(width=8, latent_channels=4, latent_size=8, cross_attention_dim=16)


def inputs(seed: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    return x.cuda(), (torch.rand(rows) * 999).cuda(), torch.randn(rows, 5, 16).cuda()


@needs_cuda
@pytest.mark.parametrize("network", [build_unet(MODEL), build_dit(MODEL.model_copy(update={"kind": "dit", "width": 32}))])
def test_a_replayed_pass_has_the_bits_of_an_ordinary_pass(network: nn.Module) -> None:
    network = network.cuda().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # the output of an untrained transformer is zero
    replayed = CudaGraphModule(network)
    with torch.inference_mode():
        for seed, rows in ((0, 6), (1, 6), (2, 3), (3, 6)):
            network_inputs = inputs(seed, rows)
            assert torch.equal(replayed(*network_inputs).sample, network(*network_inputs).sample)
        first, second = replayed(*inputs(4)).sample, replayed(*inputs(5)).sample
        assert not torch.equal(first, second), "a later replay must not overwrite an output"
    assert len(replayed.recorded) == 2


def trained(folder: Path, **changes: object) -> list[Tensor]:
    spec = TrainSpec(num_images=64, batch_size=8, lr=1e-3, dtype="fp32", **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = build_unet(MODEL)
    trainer = Trainer(spec, RandomObjective(MODEL, 5), network, folder, make_accelerator(spec, folder, "test"))
    if spec.cuda_graphs:
        trainer.record_graph(0)
    for step in range(4):
        torch.manual_seed(step)
        trainer.step(trainer.batch(step * 8), step * 8)
    return [parameter.detach().cpu() for parameter in network.parameters()]


@needs_cuda
@pytest.mark.parametrize("microbatch", [8, 4])
def test_a_replayed_training_ends_with_the_weights_of_an_ordinary_one(tmp_path: Path, microbatch: int) -> None:
    torch.manual_seed(0)
    before = [parameter.detach().clone() for parameter in build_unet(MODEL).parameters()]
    plain = trained(tmp_path / "plain", microbatch=microbatch)
    replayed = trained(tmp_path / "graphed", microbatch=microbatch, cuda_graphs=True)
    change = sum(float((a - b).square().sum()) for a, b in zip(plain, before, strict=True)) ** 0.5
    difference = sum(float((a - b).square().sum()) for a, b in zip(plain, replayed, strict=True)) ** 0.5
    assert change > 0
    assert difference < 0.05 * change, "kernels add in no fixed order, so the bits may differ"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_graphs_without_a_cuda_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs needs a single process with a CUDA device"):
        trained(tmp_path, cuda_graphs=True)
