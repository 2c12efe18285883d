"""Families that need a pooled embedding or a mask: SDXL, PixArt and SD3, each against its own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import tiny_pipelines
from isocost.config.sampling import SolverSpec
from isocost.models.checkpoint import read_info
from isocost.models.pretrained.wrappers import pack_mask, pack_pooled, unpack_pooled
from isocost.sampling.latency import latency
from test_pretrained import DDIM, DPM, assert_equal, ours, theirs

FLOW = SolverSpec(name="euler", timestep_spacing="linspace")


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_gives_the_samples_of_its_pipeline(tmp_path: Path, zeros: bool) -> None:
    pipeline = tiny_pipelines.sdxl(force_zeros_for_empty_prompt=zeros)
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    info = read_info(folder)
    assert info.pretrained is not None
    assert info.pretrained.null_is_zero is zeros
    solvers = ((type(pipeline.scheduler), DDIM, 3.0), (DPMSolverMultistepScheduler, DPM, 1.0))
    for scheduler, solver, guidance in solvers:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        assert_equal(ours(folder, solver, guidance), theirs(pipeline, guidance))


@pytest.mark.parametrize("size_conditions", [False, True])
def test_pixart_gives_the_samples_of_its_pipeline(tmp_path: Path, size_conditions: bool) -> None:
    pipeline = tiny_pipelines.pixart(use_additional_conditions=size_conditions)
    if size_conditions:
        # The pipeline passes the image size only for a latent size of 128; isocost passes it whenever the network needs it.
        forward = pipeline.transformer.forward

        def forward_with_size(*inputs: Any, added_cond_kwargs: Any, **options: Any) -> Any:
            batch = len(inputs[0])
            size = {"resolution": torch.full((batch, 2), float(tiny_pipelines.PIXELS)), "aspect_ratio": torch.ones(batch, 1)}
            return forward(*inputs, added_cond_kwargs=size, **options)

        pipeline.transformer.forward = forward_with_size
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    for solver, scheduler in ((DPM, pipeline.scheduler), (DDIM, tiny_pipelines.ddim())):
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing", **betas)
        expected = theirs(pipeline, 4.5, use_resolution_binning=False, clean_caption=False)
        assert_equal(ours(folder, solver, 4.5), expected)


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_gives_the_samples_of_its_pipeline(tmp_path: Path, with_t5: bool) -> None:
    pipeline = tiny_pipelines.sd3(with_t5)
    folder = tiny_pipelines.written(pipeline, tmp_path / "folder")
    info = read_info(folder)
    assert (info.prediction_type, info.solver) == ("flow_prediction", FLOW)
    assert_equal(ours(folder, FLOW, 3.0), theirs(pipeline, 3.0, 16))


def test_packed_embeddings_are_unpacked_unchanged() -> None:
    embeds, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    for width in (1, 4, 7):
        pooled = torch.randn(2, width)
        unpacked = unpack_pooled(pack_pooled(embeds, pooled), width)
        assert torch.equal(unpacked[0], embeds)
        assert torch.equal(unpacked[1], pooled)
    packed = pack_mask(embeds, mask)
    assert torch.equal(packed[..., :-1], embeds)
    assert torch.equal(packed[..., -1], mask.float())


def test_latency_of_a_folder(tmp_path: Path) -> None:
    folder = tiny_pipelines.written(tiny_pipelines.sdxl(), tmp_path / "folder")
    measured = latency(folder, num_steps=2, guidance=3.0, batches=(1,), repeats=3, device="cpu")
    (batch,) = measured.batches
    assert set(batch.stages) == {"text", "denoiser", "decoder", "whole"}
    assert (batch.nfe_per_image, batch.network_calls) == (4, 2)
    assert measured.checkpoint["num_parameters"] == read_info(folder).num_parameters
