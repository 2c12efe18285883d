"""Few-step students: what they are at first, what their losses ask, and that a stopped training ends with the same bits."""

from __future__ import annotations

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
from isocost.models.unet import build_unet, embed_guidance
from isocost.training.distillation import (
    ConditionalConsistencyDistillation,
    ConsistencyDistillation,
    Distillation,
    DistillBatch,
    ProgressiveDistillation,
    grid_places,
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
        self.said = torch.randn(65, 5, 16, generator=generator)

    def __len__(self) -> int:
        return 64

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[images], torch.zeros_like(self.latents[images])

    def captions(self, images: Tensor) -> Tensor:
        return images[:, None]

    def states(self, captions: Tensor) -> Tensor:
        return self.said[captions]


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
        student = embed_guidance(teacher, spec.guidance_embed_dim)
    if adapter:
        assert isinstance(student, UNet2DConditionModel)
        student = CoDiUNet.of(student, "noisy")
        if efficient:
            student.freeze_unet()
    return teacher, student


def task_of(kind: type[Distillation], spec: DistillSpec, **how: Any) -> tuple[Distillation, nn.Module, nn.Module]:
    """The task with an average that is the student itself."""
    teacher, student = teacher_and_student(spec, **how)
    task = kind(spec, TextToImage(spec.train, RandomCache(), SCHEDULE), teacher, student)
    trainable_params = [parameter.detach() for parameter in student.parameters() if parameter.requires_grad]
    task.begin({30: trainable_params})
    return task, teacher, student


# --- networks ---


def states_and_noise() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([3.0, 500.0, 999.0]), torch.randn(3, 5, 16)


@pytest.mark.parametrize("width", [8, 64])
def test_a_student_begins_as_its_teacher_whatever_the_guidance(width: int) -> None:
    torch.manual_seed(0)
    teacher = build_unet(MODEL.model_copy(update={"width": width})).eval()
    x, timesteps, states = states_and_noise()
    embedded = guidance_embedding(torch.tensor([1.0, 2.5, 6.0]), 32)
    student = embed_guidance(teacher, 32).eval()
    assert guidance_embed_dim(student) == 32
    with torch.no_grad():
        plain = teacher(x, timesteps, states).sample
        assert torch.equal(plain, student(x, timesteps, states, timestep_cond=embedded).sample)
        adapted = CoDiUNet.of(student, "noisy").eval()
        assert torch.equal(plain, adapted(x, timesteps, states, timestep_cond=embedded).sample)
        beside = CoDiUNet.of(teacher, "concat_cond").eval()
        assert torch.equal(plain, beside(torch.cat([x, torch.randn_like(x)], 1), timesteps, states).sample)
        nn.init.normal_(student.time_embedding.cond_proj.weight)
        assert not torch.allclose(plain, student(x, timesteps, states, timestep_cond=embedded).sample)


def test_any_u_net_of_diffusers_can_be_taught_guidance() -> None:
    torch.manual_seed(0)
    other = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        use_linear_projection=True,
    ).eval()
    x, timesteps, states = states_and_noise()
    with torch.no_grad():
        plain = other(x, timesteps, states).sample
        embedded = guidance_embedding(torch.ones(3), 256)
        student = embed_guidance(other, 256).eval()
        assert torch.equal(plain, student(x, timesteps, states, timestep_cond=embedded).sample)
        adapted = CoDiUNet.of(student, "noisy").eval()
        assert torch.equal(plain, adapted(x, timesteps, states, timestep_cond=embedded).sample)


def test_mu_mixes_the_adapters_features_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = build_unet(MODEL).eval()
    adapted = CoDiUNet.of(unet, "noisy").eval()
    other = build_unet(MODEL).eval()
    encoder = {name: value for name, value in other.state_dict().items() if name.split(".")[0] in adapted.adapter}
    adapted.adapter.load_state_dict(encoder)
    x, timesteps, states = states_and_noise()
    with torch.no_grad():
        adapted.mu.fill_(1.0)
        mixed = adapted(x, timesteps, states).sample
        decoder = {name: value for name, value in unet.state_dict().items() if name not in encoder}
        other.load_state_dict({**other.state_dict(), **decoder})
        # With mu = 1 everything comes from the adapter but the time that the decoder is told, which stays the U-Net's.
        other_time, other.time_embedding = other.time_embedding, unet.time_embedding
        swapped = other(x, timesteps, states).sample
        assert not torch.allclose(mixed, unet(x, timesteps, states).sample)
        assert not torch.allclose(mixed, swapped)
        adapted.adapter["time_embedding"] = unet.time_embedding
        torch.testing.assert_close(adapted(x, timesteps, states).sample, swapped)
    adapted.adapter["time_embedding"] = other_time
    adapted.save_pretrained(tmp_path)
    again = read_network(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x, timesteps, states).sample, mixed)


def test_costs_count_the_adapter() -> None:
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


def test_the_grid_is_that_of_consistency_sampling() -> None:
    words = torch.arange(0, 2**32, 2**20)
    index, index_to = grid_places(words, 50, 1000)
    assert sorted(set(index.tolist())) == list(range(19, 1000, 20))
    assert torch.equal(index_to, (index - 20).clamp(min=0))
    scheduler = LCMScheduler.from_config(scheduler_for("v_prediction").config)
    scheduler.set_timesteps(50, original_inference_steps=50)
    assert sorted(set(index.tolist())) == sorted(scheduler.timesteps.tolist())
    later, _ = grid_places(words, 50, 1000, first=2)
    assert sorted(set(later.tolist())) == list(range(39, 1000, 20))


@pytest.mark.parametrize("one_timestep", [True, False])
def test_rows_of_a_batch_are_the_same_whoever_asks(one_timestep: bool) -> None:
    spec = distill_spec(one_timestep_per_batch=one_timestep)
    task, *_ = task_of(ConditionalConsistencyDistillation, spec)
    whole = task.batch(32, range(16), CPU)
    parts = [task.batch(32, rows, CPU) for rows in (range(5), range(5, 16))]
    for name in ("noisy", "guidance", "indices", "indices_to", "latents", "states", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert (len(set(whole.indices.tolist())) == 1) == one_timestep
    assert len(set(whole.guidance.tolist())) == 16
    assert whole.guidance.min() >= 1
    assert whole.guidance.max() <= 4
    assert torch.equal(torch.cat([part.guidance for part in whole.split(3)]), whole.guidance)
    noise = (whole.noisy - task.at(whole.indices)[0] * whole.latents) / task.at(whole.indices)[1]
    assert abs(float(noise.std()) - 1) < 0.05


# --- what the losses ask ---


def outputs(network: nn.Module, z: Tensor, indices: Tensor, states: Tensor, guidance: Tensor | None = None) -> Tensor:
    embedded = {} if guidance is None else {"timestep_cond": guidance_embedding(guidance, 32)}
    return network(z, indices.float(), states, **embedded).sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_asks_what_diffusers_schedulers_say(prediction_type: PredictionType) -> None:
    """The teacher's step is DDIMScheduler's under guidance, the consistency function is LCMScheduler's `denoised`."""
    task, teacher, student = task_of(ConsistencyDistillation, distill_spec(prediction_type))
    batch = task.batch(0, range(16), CPU)
    ddim: Any = DDIMScheduler.from_config(scheduler_for(prediction_type).config)
    ddim.set_timesteps(50)
    lcm: Any = LCMScheduler.from_config(scheduler_for(prediction_type).config)
    lcm.set_timesteps(50, original_inference_steps=50)

    def denoised(z: Tensor, index: int, row: int) -> Tensor:
        output = outputs(student, z, torch.tensor([index]), batch.states[row : row + 1], batch.guidance[row : row + 1])
        alpha, sigma = float(SCHEDULE.alpha[index]), float(SCHEDULE.sigma[index])
        x0 = (z - sigma * output) / alpha if prediction_type == "epsilon" else alpha * z - sigma * output
        skip, out = lcm.get_scalings_for_boundary_condition_discrete(index)
        return skip * z + out * x0

    expected = []
    with torch.no_grad():
        for row in range(16):
            index, index_to = int(batch.indices[row]), int(batch.indices_to[row])
            z, states = batch.noisy[row : row + 1], batch.states[row : row + 1]
            null = RandomCache().said[64:]
            of_caption, of_none = (outputs(teacher, z, torch.tensor([index]), given) for given in (states, null))
            guided = of_none + batch.guidance[row] * (of_caption - of_none)
            earlier = ddim.step(guided, index, z).prev_sample
            difference = denoised(z, index, row) - denoised(earlier, index_to, row)
            expected.append(((difference**2 + 1e-6).sqrt() - 1e-3).mean())
        loss = task.loss(student, batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)


def test_consistency_is_the_identity_at_the_clean_end() -> None:
    task, _, student = task_of(ConsistencyDistillation, distill_spec())
    batch = task.batch(0, range(16), CPU)
    with torch.no_grad():
        same = task.consistency_fn(student, batch.noisy, batch, torch.zeros(16, dtype=torch.int64))
    torch.testing.assert_close(same, batch.noisy)


def test_a_progressive_target_is_where_one_step_ends_as_two_do() -> None:
    spec = distill_spec(stages=(8, 4))
    teacher, student = teacher_and_student(spec)
    of = TextToImage(spec.train, RandomCache(), SCHEDULE)
    task = ProgressiveDistillation(spec, of, teacher, student, 8, is_first=True)
    task.begin({30: [parameter.detach() for parameter in student.parameters()]})
    batch = task.batch(0, range(16), CPU)
    fine, coarse = (solver_coefficients(SolverSpec(), steps, SCHEDULE) for steps in (16, 8))
    null = RandomCache().said[64:].expand(16, -1, -1)
    lines = [coarse.timesteps.tolist().index(float(index)) for index in batch.indices]

    def stepped(table: Any, z: Tensor, line: list[int], x0: Tensor) -> Tensor:
        a, b = (torch.tensor(values[line]).float().view(-1, 1, 1, 1) for values in (table.a, table.b))
        return a * z + b * x0

    def teach(z: Tensor, line: list[int]) -> Tensor:
        at = torch.tensor(fine.timesteps[line])
        alpha, sigma = (torch.tensor(values[line]).float().view(-1, 1, 1, 1) for values in (fine.alpha, fine.sigma))
        of_caption, of_none = (outputs(teacher, z, at, given) for given in (batch.states, null))
        return alpha * z - sigma * (of_none + batch.guidance.view(-1, 1, 1, 1) * (of_caption - of_none))

    with torch.no_grad():
        first = [2 * line for line in lines]
        z = stepped(fine, batch.noisy, first, teach(batch.noisy, first))
        second = [line + 1 for line in first]
        end = stepped(fine, z, second, teach(z, second))

        class Ideal(nn.Module):
            """Says the velocity whose single DDIM step ends at `end`."""

            def forward(self, z: Tensor, timesteps: Tensor, states: Tensor, timestep_cond: Tensor) -> Any:
                a, b = (torch.tensor(values[lines]).view(-1, 1, 1, 1) for values in (coarse.a, coarse.b))
                x0 = (end.double() - a * z.double()) / b
                alpha, sigma = (torch.tensor(values[lines]).view(-1, 1, 1, 1) for values in (coarse.alpha, coarse.sigma))
                return type("Output", (), {"sample": ((alpha * z - x0) / sigma).float()})

        assert float(task.loss(Ideal(), batch)) < 1e-6
        assert float(task.loss(student, batch)) > 1e-3
    assert set(batch.indices.tolist()) <= {int(t) for t in coarse.timesteps}


def test_codi_asks_for_one_noise_along_its_own_step_and_for_the_clean_latent() -> None:
    spec = distill_spec(guidance_range=None, latent_weight=0.5)
    task, _, student = task_of(ConditionalConsistencyDistillation, spec)
    task.teacher = None
    batch = task.batch(0, range(16), CPU)
    assert batch.indices_to.min() >= 19

    def denoised(z: Tensor, indices: Tensor) -> Tensor:
        alpha, sigma = (
            torch.tensor(values[indices.numpy()]).float().view(-1, 1, 1, 1) for values in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        tau = 10 * indices.float().view(-1, 1, 1, 1)
        x0 = alpha * z - sigma * outputs(student, z, indices, batch.states)
        return 0.25 / (tau**2 + 0.25) * z + tau / (tau**2 + 0.25).sqrt() * x0

    def noise(x: Tensor, z: Tensor, indices: Tensor) -> Tensor:
        alpha, sigma = (
            torch.tensor(values[indices.numpy()]).float().view(-1, 1, 1, 1) for values in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        return (z - alpha * x) / sigma

    x = denoised(batch.noisy, batch.indices)
    with torch.no_grad():
        alpha, sigma = (
            torch.tensor(values[batch.indices_to.numpy()]).float().view(-1, 1, 1, 1)
            for values in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        earlier = alpha * x + sigma * noise(x, batch.noisy, batch.indices)
        there = noise(denoised(earlier, batch.indices_to), earlier, batch.indices_to)
    expected = (noise(x, batch.noisy, batch.indices) - there).square().mean() + 0.5 * (x - batch.latents).square().mean()
    loss = task.loss(student, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    parameter = next(student.parameters())
    ours, theirs = (torch.autograd.grad(value, parameter)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_codis_clean_latent_moves_as_guidance_moves_the_teacher() -> None:
    task, teacher, student = task_of(ConditionalConsistencyDistillation, distill_spec(latent_weight=1.0))
    batch = task.batch(0, range(16), CPU)
    at_one = DistillBatch(**{**vars(batch), "guidance": torch.ones(16)})
    with torch.no_grad():
        loss = task.loss(student, at_one)
        task.teacher = None
        torch.testing.assert_close(loss, task.loss(student, at_one))
        without = task.loss(student, batch)
        task.teacher = teacher
        assert not torch.allclose(without, task.loss(student, batch))


# --- training ---

FAMILIES: dict[str, tuple[type[Distillation], dict[str, bool]]] = {
    "consistency": (ConsistencyDistillation, {}),
    "codi": (ConditionalConsistencyDistillation, {"adapter": True}),
    "codi-efficient": (ConditionalConsistencyDistillation, {"adapter": True, "efficient": True}),
    "progressive": (ProgressiveDistillation, {}),
}


def trained(name: str, folder: Path, num_images: int = 64, deadline: float | None = None) -> dict[str, Tensor]:
    """The published weights of a student after a few steps."""
    kind, how = FAMILIES[name]
    spec = distill_spec()
    teacher, student = teacher_and_student(spec, **how)
    of = TextToImage(spec.train, RandomCache(), SCHEDULE)
    further = {"num_steps": 8, "is_first": True} if name == "progressive" else {}
    task = kind(spec, of, teacher, student, **further)
    published: dict[str, Tensor] = {}

    def publish(_network: nn.Module, weights: Iterable[tuple[str, Tensor]], _mark: int) -> None:
        published.update({key: value.clone() for key, value in weights})

    of_train = spec.train.model_copy(update={"num_images": num_images})
    train(of_train, task, student, folder, publish, title=name, deadline=deadline)
    return published


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_stopped_training_of_a_student_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = trained(name, tmp_path / "whole")
    broken: dict[str, Tensor] = {}
    for stops in range(5):
        try:
            broken = trained(name, tmp_path / "broken", deadline=time.monotonic() + (0 if stops < 3 else 600))
            break
        except DeadlineReached:
            continue
    assert stops == 3
    assert whole.keys() == broken.keys()
    for key, value in whole.items():
        assert torch.equal(value, broken[key]), key
    lines = [(tmp_path / where / "loss.jsonl").read_text().splitlines() for where in ("whole", "broken")]
    assert json.loads(lines[0][-1]) == json.loads(lines[1][-1])


def test_the_efficient_form_leaves_the_u_net_as_it_was(tmp_path: Path) -> None:
    _, student = teacher_and_student(distill_spec(), adapter=True)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    after = trained("codi-efficient", tmp_path / "efficient")
    assert before.keys() == after.keys()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same >= {name for name in before if name.startswith("unet.")}
    assert "mu" not in same
    whole = trained("codi", tmp_path / "whole")
    assert any(not torch.equal(whole[name], before[name]) for name in before if name.startswith("unet."))


def test_the_target_is_the_average_itself(tmp_path: Path) -> None:
    spec = distill_spec()
    teacher, student = teacher_and_student(spec)
    task = ConsistencyDistillation(spec, TextToImage(spec.train, RandomCache(), SCHEDULE), teacher, student)
    averages: dict[int, list[Tensor]] = {}
    begin = task.begin

    def noted(given: Any) -> None:
        averages.update(given)
        begin(given)

    task.begin = noted  # type: ignore[method-assign]
    train(spec.train, task, student, tmp_path, lambda *_: None, title="test")
    assert sorted(averages) == [30, 40]
    for value, parameter in zip(averages[30], task.target.parameters(), strict=True):
        assert value.data_ptr() == parameter.data_ptr()
    moved = [not torch.equal(a, b) for a, b in zip(task.target.parameters(), student.parameters(), strict=True)]
    assert np.mean(moved) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(task.teacher.parameters(), teacher.parameters(), strict=True))  # type: ignore[union-attr]
