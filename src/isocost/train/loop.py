"""One training loop for every task. The same command resumes; a mark reached publishes a checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from isocost.errors import RequestError, WorkError
from isocost.progress import progress_bar
from isocost.study import TrainSpec
from isocost.train.state import Ema, load_state, save_state
from isocost.train.tasks import Task

Publish = Callable[[nn.Module, int], None]
LOG_EVERY_STEPS = 20


class OutOfTime(WorkError):
    """The deadline came; the state is durable and the same command goes on."""


def train(
    spec: TrainSpec,
    task: Task,
    network: nn.Module,
    run: Path,
    publish: Publish,
    *,
    title: str,
    deadline: float | None = None,
) -> None:
    """Train `network` in place until `spec.num_images`, from the newest state in the folder `run` if there is one.

    `publish(network, mark)` is called with the EMA weights at each mark. The n-th batch, its noise and its order are
    functions of (seed, images seen), so a training that was stopped and one that was not give the same bits.

    Args:
        deadline: `time.monotonic()` after which the state is saved and OutOfTime raised.

    Raises:
        RequestError: `spec.tracker` is not installed.
        WorkError: the loss is not finite; the last durable state stays.
    """
    if spec.tracker != "none" and find_spec(spec.tracker) is None:
        raise RequestError(f"train.tracker: {spec.tracker} is not installed: pip install {spec.tracker}, or tracker: none")
    accelerator = Accelerator(
        log_with=None if spec.tracker == "none" else spec.tracker,
        project_dir=str(run / "tracker"),
    )
    if spec.tracker != "none":
        accelerator.init_trackers(title, config=spec.model_dump(mode="json", exclude={"marks", "adam_betas"}))
    network = network.train().to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=spec.lr, betas=spec.adam_betas, weight_decay=spec.weight_decay, fused=True
    )
    ema = Ema(network, spec.ema_half_life_images)
    run.mkdir(parents=True, exist_ok=True)
    images_seen = load_state(run, network, ema, optimizer)
    _cut_log(run / "loss.jsonl", images_seen)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    marks = [mark for mark in spec.all_marks if mark > images_seen]
    last_saved, losses = images_seen, []
    with progress_bar(title, spec.num_images, "images", images_seen) as progress, (run / "loss.jsonl").open("a") as log:
        while marks:
            batch = task.batch(images_seen).part(accelerator.process_index, accelerator.num_processes).to(accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, images_seen)
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
                loss = task.loss(prepared, batch)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), spec.max_grad_norm)
            optimizer.step()
            images_seen += spec.batch_size
            ema.update(network, images_seen, spec.batch_size)
            losses.append(loss.detach())
            at_mark = images_seen >= marks[0]
            out_of_time = deadline is not None and time.monotonic() > deadline
            if len(losses) == LOG_EVERY_STEPS or at_mark or out_of_time:
                mean = _mean_loss(losses, accelerator, images_seen)
                losses.clear()
                if accelerator.is_main_process:
                    log.write(
                        json.dumps({"images_seen": images_seen, "loss": mean, "lr": learning_rate(spec, images_seen)}) + "\n"
                    )
                accelerator.log({"loss": mean}, step=images_seen)
                progress(min(images_seen, spec.num_images), f"loss {mean:.4f}")
            if at_mark or out_of_time or images_seen - last_saved >= spec.state_every_images:
                if losses:
                    _mean_loss(losses, accelerator, images_seen)
                log.flush()
                if accelerator.is_main_process:
                    _publish_marks(publish, network, ema, [mark for mark in marks if mark <= images_seen])
                    save_state(run, images_seen, network, ema, optimizer)
                accelerator.wait_for_everyone()
                marks = [mark for mark in marks if mark > images_seen]
                last_saved = images_seen
            if out_of_time and marks:
                raise OutOfTime(f"{title}: stopped by --stop-after at {images_seen} images; the same command goes on")
    accelerator.end_training()


def learning_rate(spec: TrainSpec, images_seen: int) -> float:
    """Linear warm-up, then constant: the paper's "lr 1e-4 for every size"; warm-up is our choice where it is set."""
    warm = min(1.0, (images_seen + spec.batch_size) / spec.warmup_images) if spec.warmup_images else 1.0
    return spec.lr * warm


def _publish_marks(publish: Publish, network: nn.Module, ema: Ema, reached: list[int]) -> None:
    if not reached:
        return
    current = [parameter.detach().clone() for parameter in network.parameters()]
    ema.copy_to(network)
    for mark in reached:
        publish(network, mark)
    with torch.no_grad():
        torch._foreach_copy_(list(network.parameters()), current)


def _mean_loss(losses: list[Tensor], accelerator: Accelerator, images_seen: int) -> float:
    mean = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
    if not math.isfinite(mean):
        raise WorkError(
            f"the loss is {mean} near image {images_seen}; the last good state stays; lower train.lr or the precision"
        )
    return mean


def _cut_log(file: Path, images_seen: int) -> None:
    """Drop lines that a killed training wrote after its last durable state."""
    if file.is_file():
        kept = [line for line in file.read_text().splitlines() if _images_of(line) <= images_seen]
        file.write_text("".join(f"{line}\n" for line in kept))


def _images_of(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
