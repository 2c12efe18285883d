"""Distillation: initial students, losses, and interrupted trainings that end with the bits of uninterrupted ones."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from isocost.config.finetune import DistillSpec
from isocost.config.model import ModelSpec
from isocost.config.sampling import SolverSpec
from isocost.config.training import TrainSpec
from isocost.config.types import PredictionType
from isocost.data.latent_cache import Cache
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.checkpoint import scheduler_for
from isocost.models.codi_unet import CoDiUNet
from isocost.models.factory import build_network, guidance_embed_dim, read_network
from isocost.models.flops import model_cost
from isocost.models.guidance_embedding import guidance_embedding
from isocost.models.unet import add_unet_guidance_embedding, build_unet
from isocost.training.distillation import (
    ConditionalConsistencyDistillation,
    ConsistencyDistillation,
    Distillation,
    DistillBatch,
    ProgressiveDistillation,
    sample_grid_step,
)
from isocost.training.objectives import TextToImage
from isocost.training.trainer import DeadlineReached, train

SCHEDULE = NoiseSchedule.scaled_linear()
MODEL = ModelSpec(width=8, latent_channels=4, latent_size=8, cross_attention_dim=16, layers_per_block=1, num_levels=2)
CPU = torch.device("cpu")


class RandomCache(Cache):
    """Sixty-four random latents and captions."""

    null_caption = 64  # type: ignore[assignment]
    has_prompt_embeds = True  # type: ignore[assignment]

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(64, 4, 8, 8, generator=generator)
        self.prompt_table = torch.randn(65, 5, 16, generator=generator)

    def __len__(self) -> int:
        return 64

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[images], torch.zeros_like(self.latents[images])

    def captions(self, images: Tensor) -> Tensor:
        return images[:, None]

    def prompt_embeds(self, captions: Tensor) -> Tensor:
        return self.prompt_table[captions]


def train_spec(prediction_type: PredictionType = "v_prediction", **changes: Any) -> TrainSpec:
    spec = TrainSpec(
        num_images=64,
        batch_size=16,
        lr=1e-3,
        prediction_type=prediction_type,
        ema_half_life_images=(40, 30),
        state_every_images=16,
    )
    return spec.model_copy(update=changes)


def distill_spec(prediction_type: PredictionType = "v_prediction", **changes: Any) -> DistillSpec:
    plain = {
        "guidance_range": (1.0, 4.0),
        "guidance_embed_dim": 32,
        "target_half_life_images": 30,
        "train": train_spec(prediction_type).model_dump(),
        "sweep": {"guidance": [1.0]},
    }
    return DistillSpec.model_validate(plain | changes)


def teacher_and_student(spec: DistillSpec, adapter: bool = False, efficient: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = build_unet(MODEL).eval()
    student: nn.Module = teacher
    if spec.guidance_range is not None:
        student = add_unet_guidance_embedding(teacher, spec.guidance_embed_dim)
    if adapter:
        assert isinstance(student, UNet2DConditionModel)
        student = CoDiUNet.from_unet(student, "noisy")
        if efficient:
            student.freeze_unet()
    return teacher, student


def make_objective(
    objective_class: type[Distillation], spec: DistillSpec, **options: Any
) -> tuple[Distillation, nn.Module, nn.Module]:
    """An objective whose average is the student itself, with its teacher and student."""
    teacher, student = teacher_and_student(spec, **options)
    objective = objective_class(spec, TextToImage(spec.train, RandomCache(), SCHEDULE), teacher, student)
    trainable_params = [parameter.detach() for parameter in student.parameters() if parameter.requires_grad]
    objective.on_train_start({30: trainable_params})
    return objective, teacher, student


# --- networks ---


def random_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([3.0, 500.0, 999.0]), torch.randn(3, 5, 16)


@pytest.mark.parametrize("width", [8, 64])
def test_an_untrained_student_equals_its_teacher_at_any_guidance(width: int) -> None:
    torch.manual_seed(0)
    teacher = build_unet(MODEL.model_copy(update={"width": width})).eval()
    x, timesteps, prompt_embeds = random_inputs()
    embedded = guidance_embedding(torch.tensor([1.0, 2.5, 6.0]), 32)
    student = add_unet_guidance_embedding(teacher, 32).eval()
    assert guidance_embed_dim(student) == 32
    with torch.no_grad():
        plain = teacher(x, timesteps, prompt_embeds).sample
        assert torch.equal(plain, student(x, timesteps, prompt_embeds, timestep_cond=embedded).sample)
        adapted = CoDiUNet.from_unet(student, "noisy").eval()
        assert torch.equal(plain, adapted(x, timesteps, prompt_embeds, timestep_cond=embedded).sample)
        adapted = CoDiUNet.from_unet(teacher, "concat_cond").eval()
        assert torch.equal(plain, adapted(torch.cat([x, torch.randn_like(x)], 1), timesteps, prompt_embeds).sample)
        nn.init.normal_(student.time_embedding.cond_proj.weight)
        assert not torch.allclose(plain, student(x, timesteps, prompt_embeds, timestep_cond=embedded).sample)


def test_any_u_net_of_diffusers_can_take_a_guidance_embedding() -> None:
    torch.manual_seed(0)
    teacher = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        use_linear_projection=True,
    ).eval()
    x, timesteps, prompt_embeds = random_inputs()
    with torch.no_grad():
        plain = teacher(x, timesteps, prompt_embeds).sample
        embedded = guidance_embedding(torch.ones(3), 256)
        student = add_unet_guidance_embedding(teacher, 256).eval()
        assert torch.equal(plain, student(x, timesteps, prompt_embeds, timestep_cond=embedded).sample)
        adapted = CoDiUNet.from_unet(student, "noisy").eval()
        assert torch.equal(plain, adapted(x, timesteps, prompt_embeds, timestep_cond=embedded).sample)


def test_mu_mixes_in_the_features_of_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = build_unet(MODEL).eval()
    adapted = CoDiUNet.from_unet(unet, "noisy").eval()
    donor = build_unet(MODEL).eval()
    encoder = {name: value for name, value in donor.state_dict().items() if name.split(".")[0] in adapted.adapter}
    adapted.adapter.load_state_dict(encoder)
    x, timesteps, prompt_embeds = random_inputs()
    with torch.no_grad():
        adapted.mu.fill_(1.0)
        mixed = adapted(x, timesteps, prompt_embeds).sample
        decoder = {name: value for name, value in unet.state_dict().items() if name not in encoder}
        donor.load_state_dict({**donor.state_dict(), **decoder})
        # With mu = 1 everything comes from the adapter except the time embedding of the decoder, which is the U-Net's.
        donor_time, donor.time_embedding = donor.time_embedding, unet.time_embedding
        swapped = donor(x, timesteps, prompt_embeds).sample
        assert not torch.allclose(mixed, unet(x, timesteps, prompt_embeds).sample)
        assert not torch.allclose(mixed, swapped)
        adapted.adapter["time_embedding"] = unet.time_embedding
        torch.testing.assert_close(adapted(x, timesteps, prompt_embeds).sample, swapped)
    adapted.adapter["time_embedding"] = donor_time
    adapted.save_pretrained(tmp_path)
    again = read_network(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x, timesteps, prompt_embeds).sample, mixed)


def test_costs_include_the_adapter() -> None:
    plain = model_cost(MODEL, 5)
    embedded = model_cost(MODEL.model_copy(update={"guidance_embed_dim": 32}), 5)
    adapted = model_cost(MODEL.model_copy(update={"guidance_embed_dim": 32, "adapter": "noisy"}), 5)
    assert plain.gflop_per_forward < embedded.gflop_per_forward < 1.01 * plain.gflop_per_forward
    network = build_network(MODEL.model_copy(update={"guidance_embed_dim": 32, "adapter": "noisy"}))
    assert isinstance(network, CoDiUNet)
    encoder = sum(parameter.numel() for parameter in network.adapter.parameters())
    assert adapted.num_parameters == embedded.num_parameters + encoder + network.mu.numel()
    assert 1.2 < adapted.gflop_per_forward / embedded.gflop_per_forward < 1.8
    ratio = embedded.gflop_per_forward / plain.gflop_per_forward
    assert embedded.normalized_cost_per_step == pytest.approx(plain.normalized_cost_per_step * ratio)


# --- grids and batches ---


def test_the_grid_equals_that_of_consistency_sampling() -> None:
    draws = torch.arange(0, 2**32, 2**20)
    index, index_next = sample_grid_step(draws, 50, 1000)
    assert sorted(set(index.tolist())) == list(range(19, 1000, 20))
    assert torch.equal(index_next, (index - 20).clamp(min=0))
    scheduler = LCMScheduler.from_config(scheduler_for("v_prediction").config)
    scheduler.set_timesteps(50, original_inference_steps=50)
    assert sorted(set(index.tolist())) == sorted(scheduler.timesteps.tolist())
    later, _ = sample_grid_step(draws, 50, 1000, first=2)
    assert sorted(set(later.tolist())) == list(range(39, 1000, 20))


@pytest.mark.parametrize("one_timestep", [True, False])
def test_rows_do_not_depend_on_the_other_rows_of_a_call(one_timestep: bool) -> None:
    spec = distill_spec(one_timestep_per_batch=one_timestep)
    objective, *_ = make_objective(ConditionalConsistencyDistillation, spec)
    whole = objective.batch(32, range(16), CPU)
    parts = [objective.batch(32, rows, CPU) for rows in (range(5), range(5, 16))]
    for name in ("noisy", "guidance", "indices", "indices_next", "latents", "prompt_embeds", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert (len(set(whole.indices.tolist())) == 1) == one_timestep
    assert len(set(whole.guidance.tolist())) == 16
    assert whole.guidance.min() >= 1
    assert whole.guidance.max() <= 4
    assert torch.equal(torch.cat([part.guidance for part in whole.split(3)]), whole.guidance)
    alpha, sigma, *_ = objective.coefficients_at(whole.indices)
    noise = (whole.noisy - alpha * whole.latents) / sigma
    assert abs(float(noise.std()) - 1) < 0.05


# --- losses ---


def outputs(network: nn.Module, z: Tensor, indices: Tensor, prompt_embeds: Tensor, guidance: Tensor | None = None) -> Tensor:
    embedded = {} if guidance is None else {"timestep_cond": guidance_embedding(guidance, 32)}
    return network(z, indices.float(), prompt_embeds, **embedded).sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_consistency_loss_equals_one_from_the_schedulers_of_diffusers(prediction_type: PredictionType) -> None:
    """The teacher steps as DDIMScheduler does under guidance; the consistency function is the `denoised` of LCMScheduler."""
    objective, teacher, student = make_objective(ConsistencyDistillation, distill_spec(prediction_type))
    batch = objective.batch(0, range(16), CPU)
    ddim: Any = DDIMScheduler.from_config(scheduler_for(prediction_type).config)
    ddim.set_timesteps(50)
    lcm: Any = LCMScheduler.from_config(scheduler_for(prediction_type).config)
    lcm.set_timesteps(50, original_inference_steps=50)

    def denoised(z: Tensor, index: int, row: int) -> Tensor:
        output = outputs(student, z, torch.tensor([index]), batch.prompt_embeds[row : row + 1], batch.guidance[row : row + 1])
        alpha, sigma = float(SCHEDULE.alpha[index]), float(SCHEDULE.sigma[index])
        x0 = (z - sigma * output) / alpha if prediction_type == "epsilon" else alpha * z - sigma * output
        skip, out = lcm.get_scalings_for_boundary_condition_discrete(index)
        return skip * z + out * x0

    expected = []
    with torch.no_grad():
        for row in range(16):
            index, index_next = int(batch.indices[row]), int(batch.indices_next[row])
            z, prompt_embeds = batch.noisy[row : row + 1], batch.prompt_embeds[row : row + 1]
            null = RandomCache().prompt_table[64:]
            cond, uncond = (outputs(teacher, z, torch.tensor([index]), embeds) for embeds in (prompt_embeds, null))
            guided = uncond + batch.guidance[row] * (cond - uncond)
            z_next = ddim.step(guided, index, z).prev_sample
            difference = denoised(z, index, row) - denoised(z_next, index_next, row)
            expected.append(((difference**2 + 1e-6).sqrt() - 1e-3).mean())
        loss = objective.loss(student, batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)


def test_the_consistency_function_is_the_identity_at_the_clean_end() -> None:
    objective, _, student = make_objective(ConsistencyDistillation, distill_spec())
    batch = objective.batch(0, range(16), CPU)
    with torch.no_grad():
        same = objective.consistency_fn(student, batch.noisy, batch, torch.zeros(16, dtype=torch.int64))
    torch.testing.assert_close(same, batch.noisy)


def test_a_progressive_target_makes_one_step_end_where_two_steps_end() -> None:
    spec = distill_spec(stages=(8, 4))
    teacher, student = teacher_and_student(spec)
    base = TextToImage(spec.train, RandomCache(), SCHEDULE)
    objective = ProgressiveDistillation(spec, base, teacher, student, 8, is_first=True)
    objective.on_train_start({30: [parameter.detach() for parameter in student.parameters()]})
    batch = objective.batch(0, range(16), CPU)
    fine, coarse = (solver_coefficients(SolverSpec(), steps, SCHEDULE) for steps in (16, 8))
    null = RandomCache().prompt_table[64:].expand(16, -1, -1)
    steps = [coarse.timesteps.tolist().index(float(index)) for index in batch.indices]

    def take_step(coefficients: Any, z: Tensor, step: list[int], x0: Tensor) -> Tensor:
        a, b = (torch.tensor(values[step]).float().view(-1, 1, 1, 1) for values in (coefficients.a, coefficients.b))
        return a * z + b * x0

    def teacher_x0(z: Tensor, step: list[int]) -> Tensor:
        timesteps = torch.tensor(fine.timesteps[step])
        alpha, sigma = (torch.tensor(values[step]).float().view(-1, 1, 1, 1) for values in (fine.alpha, fine.sigma))
        cond, uncond = (outputs(teacher, z, timesteps, embeds) for embeds in (batch.prompt_embeds, null))
        return alpha * z - sigma * (uncond + batch.guidance.view(-1, 1, 1, 1) * (cond - uncond))

    with torch.no_grad():
        first = [2 * step for step in steps]
        z = take_step(fine, batch.noisy, first, teacher_x0(batch.noisy, first))
        second = [step + 1 for step in first]
        end = take_step(fine, z, second, teacher_x0(z, second))

        class Ideal(nn.Module):
            """Returns the velocity whose single DDIM step ends at `end`."""

            def forward(self, z: Tensor, timesteps: Tensor, prompt_embeds: Tensor, timestep_cond: Tensor) -> Any:
                a, b = (torch.tensor(values[steps]).view(-1, 1, 1, 1) for values in (coarse.a, coarse.b))
                x0 = (end.double() - a * z.double()) / b
                alpha, sigma = (torch.tensor(values[steps]).view(-1, 1, 1, 1) for values in (coarse.alpha, coarse.sigma))
                return type("Output", (), {"sample": ((alpha * z - x0) / sigma).float()})

        assert float(objective.loss(Ideal(), batch)) < 1e-6
        assert float(objective.loss(student, batch)) > 1e-3
    assert set(batch.indices.tolist()) <= {int(t) for t in coarse.timesteps}


def test_the_codi_loss_compares_the_noise_along_the_students_step_and_the_clean_latent() -> None:
    spec = distill_spec(guidance_range=None, latent_weight=0.5)
    objective, _, student = make_objective(ConditionalConsistencyDistillation, spec)
    objective.teacher = None
    batch = objective.batch(0, range(16), CPU)
    assert batch.indices_next.min() >= 19

    def denoised(z: Tensor, indices: Tensor) -> Tensor:
        alpha, sigma = (
            torch.tensor(values[indices.numpy()]).float().view(-1, 1, 1, 1) for values in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        tau = 10 * indices.float().view(-1, 1, 1, 1)
        x0 = alpha * z - sigma * outputs(student, z, indices, batch.prompt_embeds)
        return 0.25 / (tau**2 + 0.25) * z + tau / (tau**2 + 0.25).sqrt() * x0

    def noise(x: Tensor, z: Tensor, indices: Tensor) -> Tensor:
        alpha, sigma = (
            torch.tensor(values[indices.numpy()]).float().view(-1, 1, 1, 1) for values in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        return (z - alpha * x) / sigma

    x = denoised(batch.noisy, batch.indices)
    with torch.no_grad():
        alpha, sigma = (
            torch.tensor(values[batch.indices_next.numpy()]).float().view(-1, 1, 1, 1)
            for values in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        z_next = alpha * x + sigma * noise(x, batch.noisy, batch.indices)
        target_eps = noise(denoised(z_next, batch.indices_next), z_next, batch.indices_next)
    expected = (noise(x, batch.noisy, batch.indices) - target_eps).square().mean() + 0.5 * (x - batch.latents).square().mean()
    loss = objective.loss(student, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    parameter = next(student.parameters())
    ours, theirs = (torch.autograd.grad(value, parameter)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("null_prompt", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_of_a_pair_equals_a_plain_computation_in_float64(prediction_type: PredictionType, null_prompt: bool) -> None:
    """The clean latent and the noise of `guide + w (teacher - guide)`, and the loss of CoDi whose clean latent they shift."""
    spec = distill_spec(prediction_type, guide={"size": "smaller", "null_prompt": null_prompt})
    teacher, student = teacher_and_student(spec)
    guide = build_unet(MODEL.model_copy(update={"width": 4})).eval()
    objective = ConsistencyDistillation(spec, TextToImage(spec.train, RandomCache(), SCHEDULE), teacher, student, guide)
    objective.on_train_start({30: [parameter.detach() for parameter in student.parameters()]})
    batch = objective.batch(0, range(16), CPU)
    z, w = batch.noisy.double(), batch.guidance.double().view(-1, 1, 1, 1)
    alpha, sigma = (
        torch.tensor(values[batch.indices.numpy()]).view(-1, 1, 1, 1) for values in (SCHEDULE.alpha, SCHEDULE.sigma)
    )
    prompts = batch.prompt_embeds.double()
    guide_prompts = RandomCache().prompt_table[64:].double().expand_as(prompts) if null_prompt else prompts
    with torch.no_grad():
        own = copy.deepcopy(teacher).double()(z, batch.indices, prompts).sample
        second = copy.deepcopy(guide).double()(z, batch.indices, guide_prompts).sample
        output = second + w * (own - second)
        if prediction_type == "epsilon":
            x0, eps = (z - sigma * output) / alpha, output
        else:
            x0, eps = alpha * z - sigma * output, sigma * z + alpha * output
        actual = objective.guided_prediction(teacher, batch.noisy, batch, batch.indices)
    torch.testing.assert_close(actual.x0.double(), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.eps.double(), eps, rtol=1e-4, atol=1e-3)
    assert float((own - second).abs().mean()) > 1e-2


@pytest.mark.parametrize(
    ("kind", "num_passes"),
    [(ConsistencyDistillation, 2), (ConditionalConsistencyDistillation, 2), (ProgressiveDistillation, 4)],
)
def test_the_guided_teacher_takes_the_passes_that_the_training_cost_states(kind: type[Distillation], num_passes: int) -> None:
    spec = distill_spec()
    teacher, student = teacher_and_student(spec)
    stage: dict[str, Any] = {"num_steps": 8, "is_first": True} if kind is ProgressiveDistillation else {}
    objective = kind(spec, TextToImage(spec.train, RandomCache(), SCHEDULE), teacher, student, **stage)
    objective.on_train_start({30: [parameter.detach() for parameter in student.parameters()]})
    calls: list[object] = []
    assert objective.teacher is not None
    handle = objective.teacher.register_forward_hook(lambda *_: calls.append(None))
    objective.loss(student, objective.batch(0, range(4), CPU))
    handle.remove()
    assert len(calls) == num_passes


def test_guidance_shifts_the_clean_latent_of_codi_as_it_shifts_the_teacher() -> None:
    objective, teacher, student = make_objective(ConditionalConsistencyDistillation, distill_spec(latent_weight=1.0))
    batch = objective.batch(0, range(16), CPU)
    at_one = DistillBatch(**{**vars(batch), "guidance": torch.ones(16)})
    with torch.no_grad():
        loss = objective.loss(student, at_one)
        objective.teacher = None
        torch.testing.assert_close(loss, objective.loss(student, at_one))
        loss_without_teacher = objective.loss(student, batch)
        objective.teacher = teacher
        assert not torch.allclose(loss_without_teacher, objective.loss(student, batch))


# --- training ---

FAMILIES: dict[str, tuple[type[Distillation], dict[str, bool]]] = {
    "consistency": (ConsistencyDistillation, {}),
    "codi": (ConditionalConsistencyDistillation, {"adapter": True}),
    "codi-efficient": (ConditionalConsistencyDistillation, {"adapter": True, "efficient": True}),
    "progressive": (ProgressiveDistillation, {}),
}


def train_student(name: str, folder: Path, num_images: int = 64, deadline: float | None = None) -> dict[str, Tensor]:
    """Train a student for a few steps; returns the saved weights."""
    objective_class, options = FAMILIES[name]
    spec = distill_spec()
    teacher, student = teacher_and_student(spec, **options)
    base = TextToImage(spec.train, RandomCache(), SCHEDULE)
    stage_options = {"num_steps": 8, "is_first": True} if name == "progressive" else {}
    objective = objective_class(spec, base, teacher, student, **stage_options)
    saved: dict[str, Tensor] = {}

    def save_snapshot(_network: nn.Module, weights: Iterable[tuple[str, Tensor]], _snapshot: int) -> None:
        saved.update({key: value.clone() for key, value in weights})

    spec_of_run = spec.train.model_copy(update={"num_images": num_images})
    train(spec_of_run, objective, student, folder, save_snapshot, title=name, deadline=deadline)
    return saved


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "consistency" else pytest.mark.slow) for name in FAMILIES]
)
def test_an_interrupted_training_of_a_student_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    uninterrupted = train_student(name, tmp_path / "whole")
    interrupted: dict[str, Tensor] = {}
    for stops in range(5):
        try:
            interrupted = train_student(name, tmp_path / "broken", deadline=time.monotonic() + (0 if stops < 3 else 600))
            break
        except DeadlineReached:
            continue
    assert stops == 3
    assert uninterrupted.keys() == interrupted.keys()
    for key, value in uninterrupted.items():
        assert torch.equal(value, interrupted[key]), key
    lines = [(tmp_path / run / "loss.jsonl").read_text().splitlines() for run in ("whole", "broken")]
    assert json.loads(lines[0][-1]) == json.loads(lines[1][-1])


@pytest.mark.slow
def test_the_efficient_form_does_not_change_the_u_net(tmp_path: Path) -> None:
    _, student = teacher_and_student(distill_spec(), adapter=True)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    after = train_student("codi-efficient", tmp_path / "efficient")
    assert before.keys() == after.keys()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same >= {name for name in before if name.startswith("unet.")}
    assert "mu" not in same
    full = train_student("codi", tmp_path / "full")
    assert any(not torch.equal(full[name], before[name]) for name in before if name.startswith("unet."))


def test_the_target_is_the_average_itself(tmp_path: Path) -> None:
    spec = distill_spec()
    teacher, student = teacher_and_student(spec)
    objective = ConsistencyDistillation(spec, TextToImage(spec.train, RandomCache(), SCHEDULE), teacher, student)
    averages: dict[int, list[Tensor]] = {}
    on_train_start = objective.on_train_start

    def record_averages(averages_by_half_life: Any) -> None:
        averages.update(averages_by_half_life)
        on_train_start(averages_by_half_life)

    objective.on_train_start = record_averages  # type: ignore[method-assign]
    train(spec.train, objective, student, tmp_path, lambda *_: None, title="test")
    assert sorted(averages) == [30, 40]
    for value, parameter in zip(averages[30], objective.target.parameters(), strict=True):
        assert value.data_ptr() == parameter.data_ptr()
    moved = [not torch.equal(a, b) for a, b in zip(objective.target.parameters(), student.parameters(), strict=True)]
    assert np.mean(moved) > 0.9
    copied = objective.teacher
    assert copied is not None
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), teacher.parameters(), strict=True))
