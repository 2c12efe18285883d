"""Transformers: sizes and costs against formulas, diffusers' own class and scheduler as references, and a whole study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from conftest import plain_study, tiny_study
from engine_fixtures import EMBED_DIM, NUM_PROMPTS, SD_SCHEDULER, SHAPE, coefficients, prompt_embeds
from isocost.config.base import digest
from isocost.config.model import FamilySpec, ModelSpec
from isocost.config.sampling import SolverSpec
from isocost.config.training import TrainSpec
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.errors import ConfigError
from isocost.models.checkpoint import load_checkpoint, save_networks
from isocost.models.dit import PUBLISHED_SIZES, DiT, GuidedTransformer, check_dit_width, depth_of, head_dim, patch_size_of
from isocost.models.export_diffusers import export
from isocost.models.factory import (
    add_guidance_embedding,
    build_network,
    component_name,
    expand_in_channels,
    guidance_embed_dim,
    read_network,
)
from isocost.models.flops import model_cost
from isocost.models.guidance_embedding import guidance_embedding
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.engine import Engine
from isocost.sampling.request import SampleRequest
from isocost.sampling.sample import sample
from isocost.training.memory_estimate import training_memory

SMALL = ModelSpec(kind="dit", width=32, latent_size=8, cross_attention_dim=EMBED_DIM)
AUTOENCODER = {"kind": "pretrained", "path": "scenes"}


def small_dit(spec: ModelSpec = SMALL) -> DiT:
    """A network without zero weights; a new network has an output layer of zeros."""
    torch.manual_seed(0)
    network = build_network(spec)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval().requires_grad_(False)


def random_inputs(batch: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Latents [B, C, 8, 8] and timesteps [B]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, 8, 8, generator=generator), 999 * torch.rand(batch, generator=generator)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_published_transformers_are_members_and_small_ones_follow_the_rule() -> None:
    assert [(width, depth_of(width)) for width, _ in PUBLISHED_SIZES] == list(PUBLISHED_SIZES)
    assert [depth_of(width) for width in (16, 64, 128, 192, 256, 512, 896, 1536)] == [4, 4, 4, 6, 8, 12, 18, 37]
    assert [head_dim(width) for width in (16, 32, 48, 64, 96, 256, 384, 768, 1024, 1152)] == [4, 8, 8, 16, 16, *[64] * 5]
    depths = [depth_of(width) for width in range(32, 2048, 32)]
    assert depths == sorted(depths)


def num_parameters(spec: ModelSpec) -> int:
    return sum(parameter.numel() for parameter in build_network(spec, "meta").parameters())


def test_parameters_are_those_of_the_published_weights() -> None:
    """PixArt-XL-2-512x512 has 610,856,096 parameters; 4 of its 8 output channels are a variance that DiT does not predict."""
    ours = num_parameters(ModelSpec(kind="dit", width=1152, cross_attention_dim=4096))
    assert ours + 4 * 2 * 2 * (1152 + 1) == 610_856_096


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.slow
def test_parameters_and_gflop_follow_from_a_formula(patch: int) -> None:
    c, depth, channels, size, tokens, context = 96, 4, 4, 8, 5, 24
    spec = ModelSpec(kind="dit", width=c, latent_size=size, cross_attention_dim=context, extra_input_channels=4, patch=patch)
    cost = model_cost(spec, tokens)
    n, area = (size // patch) ** 2, patch * patch
    block_parameters = 16 * c * c + 19 * c  # two attentions, a feed-forward layer of 4c, and six vectors of adaLN-single
    embeddings = 2 * channels * area * c + c + 256 * c + c + c * c + c + 6 * c * c + 6 * c + context * c + c + c * c + c
    assert cost.num_parameters == depth * block_parameters + embeddings + 2 * c + channels * area * (c + 1)
    block_macs = (4 * c * c + 2 * n * c) * n + (2 * c * c + 2 * tokens * c) * n + 2 * c * c * tokens + 8 * c * c * n
    other_macs = 3 * channels * area * c * n + 256 * c + 7 * c * c + tokens * (context * c + c * c)
    assert cost.gflop_per_forward == pytest.approx(2 * (depth * block_macs + other_macs) / 1e9, rel=1e-12)
    assert cost.size == f"DiT-{cost.num_parameters / 1e3:.0f}K"
    unet = model_cost(ModelSpec(width=320, latent_size=size, cross_attention_dim=context), tokens)
    assert unet.normalized_cost_per_step == 1  # costs of both families are relative to the paper's U-Net
    assert cost.normalized_cost_per_step == cost.gflop_per_forward / unet.gflop_per_forward


def test_the_patch_size_is_2_for_large_latents() -> None:
    assert [patch_size_of(ModelSpec(kind="dit", width=16, latent_size=size)) for size in (4, 8, 15, 16, 64)] == [1, 1, 1, 2, 2]
    assert patch_size_of(ModelSpec(kind="dit", width=16, latent_size=8, patch=4)) == 4


def test_a_unets_digests_do_not_change() -> None:
    assert digest(ModelSpec(width=8)) == digest({"width": 8})
    assert digest(FamilySpec(widths=(8,))) == digest({"widths": [8]})
    assert digest(ModelSpec(kind="dit", width=8)) != digest(ModelSpec(width=8))


def test_training_memory_is_estimated_and_checkpointing_takes_less() -> None:
    plain, lean = (TrainSpec(num_images=8, gradient_checkpointing=on) for on in (False, True))
    model = ModelSpec(kind="dit", width=64, latent_size=16, cross_attention_dim=32)
    assert training_memory(model, lean, 8, 6).step < training_memory(model, plain, 8, 6).step
    assert training_memory(model, plain, 8, 6).state == 4 * 4 * num_parameters(model)


# --- the network ------------------------------------------------------------------------------------------------------


def test_images_are_those_of_a_plain_ddim_loop_in_diffusers() -> None:
    """Classifier-free guidance by two passes of diffusers' own class, against precomputed keys and values in shared calls."""
    plain = PixArtTransformer2DModel.from_config(small_dit().config)
    plain.load_state_dict(small_dit().state_dict())
    embeds = prompt_embeds()
    denoiser = Denoiser(small_dit())
    null = denoiser.project(embeds[-1:])[0]
    engine = Engine(denoiser.denoise(), "epsilon", lambda prompts: denoiser.project(embeds[prompts]), null, SHAPE, 8)
    steps = coefficients(SolverSpec(), 8)
    rows = [SampleRequest(i, i % NUM_PROMPTS, steps, (1.0, 2.0, 7.5)[i % 3], seed=3) for i in range(9)]
    made = {done.request.sample_index: done for done in engine.run(rows)}
    for row in rows:
        scheduler = DDIMScheduler(
            **SD_SCHEDULER, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", prediction_type="epsilon"
        )
        scheduler.set_timesteps(8)
        x = philox_normal(3, torch.tensor([row.sample_index]), INITIAL_NOISE, SHAPE, "cpu")
        for timestep in scheduler.timesteps:
            both = torch.stack([embeds[row.prompt], embeds[-1]])
            with torch.inference_mode():
                output = plain(x.expand(2, -1, -1, -1), encoder_hidden_states=both, timestep=timestep.expand(2)).sample
            conditional, without = output.split(1)
            x = scheduler.step(without + row.guidance * (conditional - without), timestep, x).prev_sample
        done = made[row.sample_index]
        assert done.nfe == (8 if row.guidance == 1 else 16)
        assert float((done.latent - x[0]).norm() / x.norm()) < 1e-4


def test_precomputed_keys_change_nothing_and_the_rest_of_the_batch_changes_no_bit() -> None:
    embeds = prompt_embeds()
    x, timesteps = random_inputs(6)
    with torch.inference_mode():
        plain = small_dit()(x, timesteps, embeds).sample
        denoiser = Denoiser(small_dit())
        projected = denoiser.project(embeds)
        ours = denoiser.denoise()(x, timesteps, projected, torch.ones(6))
        others = torch.arange(6) != 2
        x[others], timesteps[others], changed = -x[others], 500.0, projected.flip(0)
        changed[2] = projected[2]
        in_other_batch = denoiser.denoise()(x, timesteps, changed, torch.ones(6))
    assert float(plain.std()) > 0.01
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert denoiser.cross_attention_dim == projected.shape[-1] == 2 * 32 * depth_of(32)
    for i in range(6):
        assert torch.equal(denoiser.project(embeds[i : i + 1])[0], projected[i])
    assert torch.equal(in_other_batch[2], ours[2])


def test_bfloat16_is_near() -> None:
    embeds, (x, timesteps) = prompt_embeds(), random_inputs(6)
    outputs = []
    for dtype in ("fp32", "bf16"):
        denoiser = Denoiser(small_dit(), dtype)
        with torch.inference_mode():
            outputs.append(denoiser.denoise()(x, timesteps, denoiser.project(embeds), torch.ones(6)).float())
    assert 0 < float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.1


@pytest.mark.slow
def test_compiled_is_near() -> None:
    embeds, (x, timesteps) = prompt_embeds(), random_inputs(6)
    outputs = []
    for compiled in (False, True):
        denoiser = Denoiser(add_guidance_embedding(small_dit(), 12), compiled=compiled)
        with torch.inference_mode():
            outputs.append(denoiser.denoise()(x, timesteps, denoiser.project(embeds), torch.full((6,), 3.0)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)


def test_a_student_starts_as_its_teacher_at_any_guidance() -> None:
    embeds, (x, timesteps) = prompt_embeds(), random_inputs(6)
    teacher, student = small_dit(), add_guidance_embedding(small_dit(), 12)
    assert isinstance(student, GuidedTransformer)
    assert (guidance_embed_dim(teacher), guidance_embed_dim(student)) == (None, 12)
    embedded = guidance_embedding(torch.linspace(1, 8, 6), 12)
    with torch.inference_mode():
        expected = teacher(x, timesteps, embeds).sample
        assert torch.equal(student(x, timesteps, embeds, timestep_cond=embedded).sample, expected)
        student.transformer.adaln_single.emb.timestep_embedder.cond_proj.weight.normal_()
        assert not torch.allclose(student(x, timesteps, embeds, timestep_cond=embedded).sample, expected, atol=1e-3)
    assert num_parameters(SMALL.model_copy(update={"guidance_embed_dim": 12})) == sum(
        parameter.numel() for parameter in student.parameters()
    )


def test_added_input_channels_do_not_change_the_output() -> None:
    embeds, (x, timesteps) = prompt_embeds(), random_inputs(6)
    wide = expand_in_channels(small_dit(), 4)
    with torch.inference_mode():
        expected = small_dit()(x, timesteps, embeds).sample
        torch.testing.assert_close(wide(torch.cat([x, 5 * x], 1), timesteps, embeds).sample, expected, rtol=0, atol=1e-5)
    assert wide.config.in_channels == 8


@pytest.mark.parametrize("embeds_guidance", [False, True])
def test_a_folder_is_in_diffusers_format_and_loads_unchanged(tmp_path: Path, embeds_guidance: bool) -> None:
    network = add_guidance_embedding(small_dit(), 12) if embeds_guidance else small_dit()
    save_networks(tmp_path, network, "epsilon")
    assert {file.name for file in tmp_path.iterdir()} == {"transformer", "scheduler"}
    again = read_network(tmp_path / component_name(network))
    assert type(again) is type(network)
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    if not embeds_guidance:
        embeds, (x, timesteps) = prompt_embeds(), random_inputs(6)
        theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer", use_safetensors=True)
        with torch.inference_mode():
            expected = theirs(x, encoder_hidden_states=embeds, timestep=timesteps).sample
            assert torch.equal(again.eval()(x, timesteps, embeds).sample, expected)


@pytest.mark.parametrize(
    "spec", [SMALL, ModelSpec(width=8, latent_size=8, cross_attention_dim=EMBED_DIM)], ids=lambda spec: spec.kind
)
def test_a_folder_names_the_class_that_loads_it_after_fsdp(tmp_path: Path, spec: ModelSpec) -> None:
    """FSDP2 replaces the class of a module by one with the prefix `FSDP`."""
    network = build_network(spec)
    network.__class__ = type(f"FSDP{type(network).__name__}", (type(network),), {})
    save_networks(tmp_path, network, "epsilon")
    again = read_network(tmp_path / component_name(network))
    assert type(again) is type(build_network(spec))


# --- a study ----------------------------------------------------------------------------------------------------------

STUDY = {
    "family": {"kind": "dit", "widths": [16]},
    "train": {"num_images": 320, "snapshots": [160], "batch_size": 16, "lr": 3e-3},
    "superres": {
        "scale": 4,
        "train": {"num_images": 32, "microbatch": 8},
        "sweep": {"num_steps": [2], "batch_size": 16},
        "protocol": {
            "num_images": 32,
            "num_reference": 64,
            "num_bootstrap": 20,
            "metrics": ["mmd"],
            "paired_metrics": ["psnr"],
        },
        "metric": "psnr",
    },
    "distill": {
        "variants": ["consistency"],
        "guidance_range": [1, 4],
        "guidance_embed_dim": 16,
        "stages": [2, 1],
        "train": {"num_images": 32, "lr": 1e-4},
        "sweep": {"num_steps": [2], "guidance": [2], "batch_size": 16},
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(tiny_study(autoencoder=AUTOENCODER, **STUDY), tmp_path_factory.mktemp("dit"))
    assert pipeline.run()
    return pipeline


def rows_of(pipeline: Pipeline, task: str) -> pd.DataFrame:
    rows = pipeline.results_db.table()
    return rows[rows["task"] == task]


@pytest.mark.slow
def test_a_study_goes_from_images_to_table(finished: Pipeline) -> None:
    rows = rows_of(finished, "text2image")
    final_points = rows[rows["is_final"]]
    assert len(final_points) == 2 * 2
    assert set(rows["images_seen"]) == {160, 320}
    assert set(rows["size"]) == {"DiT-30K"}
    assert (final_points["nfe"] == final_points["num_steps"] * final_points["guidance"]).all()
    assert (rows["mmd_efficientnet_low"] <= rows["mmd_efficientnet_high"]).all()
    assert not any((finished.out / "artefacts" / "checkpoint").glob("*/unet"))


@pytest.mark.slow
def test_super_resolution_and_students_run_on_it(finished: Pipeline) -> None:
    assert len(rows_of(finished, "superres")) == 1
    (student,) = rows_of(finished, "distill").to_dict("records")
    assert student["size"] == "DiT-30K consistency"
    assert student["nfe"] == student["num_steps"]
    (run,) = finished.experiments["distill"].runs
    opened = load_checkpoint(finished.store.folder("checkpoint", run.final))
    assert isinstance(opened.network, GuidedTransformer)


@pytest.mark.slow
def test_a_larger_study_of_every_part_ends_in_a_report(tmp_path: Path) -> None:
    distill = {**STUDY["distill"], "variants": ["consistency", "progressive"]}
    distill["sweep"] = {"num_steps": [1, 2], "guidance": [1, 4], "search": "race", "race": {"rungs": [16, 32]}}
    superres = {**STUDY["superres"], "distill": {"train": {"num_images": 32}, "sweep": {"num_steps": [2]}}}
    subjects = {"kind": "scenes", "num_subjects": 1, "num_prompts": 2}
    dreambooth = {"subjects": subjects, "prior": {"num_images": 4, "num_steps": 2}, "num_prior_images": 32}
    dreambooth |= {"num_images": 16, "train": {"num_images": 32}, "sweep": {"num_steps": [2], "guidance": [2]}}
    sweep = {**plain_study()["sweep"], "solvers": [{"name": "ddim"}, {"name": "dpmsolver++2m"}, {"name": "ddpm"}]}
    parts = {"distill": distill, "superres": superres, "dreambooth": dreambooth, "sweep": sweep}
    pipeline = Pipeline(tiny_study(**{**STUDY, **parts, "family": {"kind": "dit", "widths": [16, 32]}}), tmp_path)
    assert pipeline.run()
    report(pipeline)
    assert (tmp_path / "report" / "index.html").is_file()
    table = pipeline.results_db.table()
    assert set(table["task"]) == {"text2image", "superres", "superres-distill", "dreambooth", "distill"}
    assert {"DiT-30K", "DiT-97K", "DiT-30K progressive"} <= set(table["size"])


@pytest.mark.slow
def test_it_learns(finished: Pipeline) -> None:
    """The loss falls below that of a network whose output is zero, as it is at the start."""
    (log,) = (finished.out / "artefacts" / "run" / finished.runs[0].digest).glob("loss.jsonl")
    losses = pd.read_json(log, lines=True)["loss"]
    assert losses.iloc[-1] < 0.8 * losses.iloc[0] < 0.9


@pytest.mark.slow
def test_diffusers_generates_the_same_images_from_prompt_embeddings(finished: Pipeline, tmp_path: Path) -> None:
    checkpoint = finished.store.folder("checkpoint", finished.runs[0].final)
    prompts = ["a red circle on a white background", "two blue squares"]
    ours = sample(checkpoint, prompts, num_steps=4, guidance=3.0, num_images=1, seed=5).array[:, 0]
    folder = export(checkpoint, tmp_path / "exported")
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    tokenizer, encoder = (loader.from_pretrained(folder / name) for loader, name in TEXT_COMPONENTS)
    tokens = tokenizer([*prompts, "", ""], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    masks = {"attention_mask": tokens.attention_mask} if encoder.config.use_attention_mask else {}
    with torch.inference_mode():
        embeds = encoder(tokens.input_ids, **masks).last_hidden_state
    ones = torch.ones(2, 8)
    theirs = pipeline(
        prompt_embeds=embeds[:2],
        prompt_attention_mask=ones,
        negative_prompt=None,
        negative_prompt_embeds=embeds[2:],
        negative_prompt_attention_mask=ones,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=philox_normal(5, torch.arange(2), INITIAL_NOISE, SHAPE, "cpu"),
        height=32,
        width=32,
        use_resolution_binning=False,
        output_type="np",
    ).images
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert sum(value.numel() for value in weights.values()) == load_checkpoint(checkpoint).info.num_parameters


TEXT_COMPONENTS = ((AutoTokenizer, "tokenizer"), (AutoModel, "text_encoder"))


@pytest.mark.slow
def test_a_student_with_guidance_as_an_input_has_no_pipeline(finished: Pipeline, tmp_path: Path) -> None:
    run = finished.experiments["distill"].runs[0]
    with pytest.raises(ConfigError, match="diffusers has no pipeline for a transformer with guidance as an input"):
        export(finished.store.folder("checkpoint", run.final), tmp_path / "exported")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "remedy"), [(8, "16 or 32"), (0, "16 or 32"), (40, "32 or 48"), (72, "64 or 96"), (400, "384 or 416")]
)
def test_a_width_that_does_not_fit_is_refused_with_neighbours(width: int, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"width {width}: attention heads .* cannot divide it.*such as {remedy}"):
        check_dit_width(width)
    with pytest.raises(ConfigError, match=rf"width {width}|family\.widths\.0 = {width}"):
        Pipeline(tiny_study(family={"kind": "dit", "widths": [width]}), tmp_path)


def test_a_latent_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"patches of 4 x 4 do not divide the latent of 18 x 18; use patch: 2"):
        build_network(ModelSpec(kind="dit", width=16, latent_size=18, patch=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": {"kind": "dit", "widths": [16], "num_levels": 3}}, "a transformer's depth follows from its width"),
        ({"family": {"widths": [16], "patch": 2}}, "patch is for kind: dit"),
        ({"family": {"kind": "vit", "widths": [16]}}, "'unet' or 'dit'"),
        (
            {"family": STUDY["family"], "distill": {**STUDY["distill"], "variants": ["codi"]}},
            "distill.variants: codi copies the encoder of a U-Net.*use consistency or progressive",
        ),
    ],
)
def test_incompatible_settings_are_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_study(**{**plain_study(), **changes})
    assert "\n" not in str(caught.value)
