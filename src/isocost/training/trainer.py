"""One training loop for every task and any number of processes. The same command resumes; a mark reached is published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from isocost.config.training import TrainSpec
from isocost.errors import ConfigError, RunError
from isocost.training.cuda_graph_step import CudaGraphStep
from isocost.training.distributed import DistributedModel, on_cpu, rows_of
from isocost.training.ema import Ema
from isocost.training.grad_accumulation import largest_microbatch
from isocost.training.lr_schedule import learning_rate
from isocost.training.objectives import Batch, Objective
from isocost.training.state_checkpoint import TrainingState, averaged, remove_partial
from isocost.utils.progress import progress_bar, say
from isocost.utils.signals import deadline_passed

Publish = Callable[[nn.Module, Iterable[tuple[str, Tensor]], int], None]
LOG_EVERY_STEPS = 20


class DeadlineReached(RunError):
    """The deadline came; the state is durable and the same command goes on."""


def train(
    spec: TrainSpec,
    task: Objective,
    network: nn.Module,
    run: Path,
    publish: Publish,
    *,
    title: str,
    snapshots: tuple[int, ...] | None = None,
    deadline: float | None = None,
) -> None:
    """Train `network` until the last of `snapshots`, from the newest state in the folder `run` if there is one.

    The n-th image, its noise and its place are functions of (seed, n), so a training that was stopped and one that was not
    give the same bits on the same number of processes, and see the same images on any.

    Args:
        publish: called on the main process with the network (for its config), the names and tensors of the EMA weights, and
            the mark, at each mark.
        snapshots: images seen, rising; `num_images` alone where None.
        deadline: `time.monotonic()` after which the state is saved and DeadlineReached raised.

    Raises:
        ConfigError: `spec.tracker` is not installed, or the batch does not divide by the number of processes.
        RunError: the loss is not finite, a state is damaged or cannot be written; the last durable state stays.
    """
    accelerator = make_accelerator(spec, run, title)
    trainer = Trainer(spec, task, network, run, accelerator)
    images_seen = last_saved = trainer.state.load()
    if spec.cuda_graphs:
        trainer.record(images_seen)
    ahead = tuple(snapshot for snapshot in snapshots or (spec.num_images,) if spec.whole_batches(snapshot) >= images_seen)
    ahead = trainer.save_snapshots(publish, ahead, images_seen)
    losses: list[Tensor] = []
    with (
        _log(run, images_seen, accelerator) as log,
        progress_bar(title, spec.num_images, "images", images_seen) as progress,
        _batches(trainer, images_seen) as batches,
    ):
        while ahead:
            losses.append(trainer.step(next(batches), images_seen))
            images_seen += spec.batch_size
            at_mark, at_log = images_seen >= ahead[0], len(losses) == LOG_EVERY_STEPS
            out_of_time = _is_late(deadline, accelerator, at_log or at_mark)
            at_save = at_mark or out_of_time or images_seen - last_saved >= spec.state_every_images
            if at_log or at_save:
                mean = _mean_loss(losses, accelerator, images_seen)
                losses.clear()
                rate = learning_rate(spec, images_seen - spec.batch_size)
                log({"images_seen": images_seen, "loss": mean, "lr": rate})
                accelerator.log({"loss": mean, "lr": rate}, step=images_seen)
                progress(min(images_seen, spec.num_images), f"loss {mean:.4f}")
            if at_save:
                ahead = trainer.save_snapshots(publish, ahead, images_seen)
                trainer.state.save(images_seen, spec, accelerator)
                last_saved = images_seen
            if out_of_time and ahead:
                raise DeadlineReached(f"{title}: stopped at {images_seen} images; the same command goes on")
    for tracker in accelerator.trackers:
        tracker.finish()


class Trainer:
    """What a training holds between two steps."""

    def __init__(self, spec: TrainSpec, task: Objective, network: nn.Module, run: Path, accelerator: Accelerator) -> None:
        self.spec, self.task, self.accelerator = spec, task, accelerator
        self.rows = rows_of(spec, accelerator)
        self.parallel = DistributedModel(network, spec, accelerator)
        self.dtype = next(network.parameters()).dtype
        self.optimizer = torch.optim.AdamW(
            self.parallel.trainable_params.values(),
            lr=spec.lr,
            betas=spec.adam_betas,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        self.ema = Ema([piece.data for piece in self.parallel.pieces()], spec.half_lives)
        self.state = TrainingState(self.parallel, self.optimizer, self.ema, run)
        if accelerator.is_main_process:
            run.mkdir(parents=True, exist_ok=True)
            remove_partial(run)
        accelerator.wait_for_everyone()
        self.task.begin(dict(zip(self.ema.half_lives, self.ema.averages, strict=True)))
        self.microbatch = largest_microbatch(self.parallel, spec, task, self.rows, self.dtype)
        self.recorded: CudaGraphStep | None = None

    def batch(self, images_seen: int) -> Batch:
        """This process's rows of the batch that follows `images_seen` images."""
        return self.task.batch(images_seen, self.rows, self.accelerator.device, self.dtype)

    def record(self, images_seen: int) -> None:
        """Record a step, to be played back from now on; after the state is restored, before batches are made beside it.

        Raises:
            ConfigError: there is no CUDA device, or several processes train.
        """
        if self.accelerator.device.type != "cuda" or self.accelerator.num_processes > 1:
            raise ConfigError("train.cuda_graphs: for one process with a CUDA device; leave it out here")
        self.recorded = CudaGraphStep(self.optimizer, self._gradients, self._optimizer_step, self.batch(images_seen))

    def step(self, batch: Batch, images_seen: int) -> Tensor:
        """One step of the optimizer and of the averages; returns the loss of this process's rows, on the device."""
        rate = learning_rate(self.spec, images_seen)
        if self.recorded is not None:
            loss = self.recorded(batch, rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._optimizer_step(batch)
        self.ema.update(images_seen + self.spec.batch_size, self.spec.batch_size)
        return loss

    def _optimizer_step(self, batch: Batch) -> Tensor:
        loss = self._gradients(batch)
        self.parallel.clip(self.spec.max_grad_norm)
        self.optimizer.step()
        return loss

    def _gradients(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return backward(self.parallel, self.task, batch, self.microbatch, self.spec.dtype)

    def save_snapshots(self, publish: Publish, snapshots: tuple[int, ...], images_seen: int) -> tuple[int, ...]:
        """Publish those that are reached; returns the others.

        Raises:
            RunError: a checkpoint cannot be written.
        """
        for snapshot in (snapshot for snapshot in snapshots if snapshot <= images_seen):
            weights = averaged(self.parallel, self.ema)
            if self.accelerator.is_main_process:
                try:
                    publish(self.parallel.network, weights, snapshot)
                except OSError as error:
                    raise RunError(f"the checkpoint at {snapshot} images cannot be written ({error}); states stay") from error
            for _ in weights:
                pass
            self.accelerator.wait_for_everyone()
        return tuple(snapshot for snapshot in snapshots if snapshot > images_seen)


def backward(parallel: DistributedModel, task: Objective, batch: Batch, microbatch: int, dtype: str) -> Tensor:
    """Gradients of the mean loss over this process's rows, `microbatch` of them at a time; returns that loss."""
    device = parallel.accelerator.device
    total = torch.zeros((), device=device)
    parts = list(batch.split(microbatch))
    for number, part in enumerate(parts, start=1):
        with parallel.no_sync_unless(number == len(parts)):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                loss = task.loss(parallel.forward, part) * (len(part) / len(batch))
            loss.backward()
        total = total + loss.detach()
    return total


def make_accelerator(spec: TrainSpec, run: Path, title: str) -> Accelerator:
    """Knows the device and the other processes (torchrun, `accelerate launch`), and opens the tracker.

    Raises:
        ConfigError: the tracker is not installed.
    """
    if spec.tracker != "none" and find_spec(spec.tracker) is None:
        raise ConfigError(f"train.tracker: {spec.tracker} is not installed: pip install {spec.tracker}, or tracker: none")
    accelerator = Accelerator(
        cpu=on_cpu(),
        log_with=None if spec.tracker == "none" else spec.tracker,
        project_dir=str(run / "tracker"),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    if spec.tracker != "none":
        plain = spec.model_dump(mode="json").items()
        accelerator.init_trackers(title, config={k: str(v) if isinstance(v, list) else v for k, v in plain})
    if spec.dtype == "bf16" and accelerator.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        say("train.precision: bf16: this processor has no bf16 matrix instructions, fp32 will be many times faster")
    return accelerator


@contextmanager
def _batches(trainer: Trainer, images_seen: int) -> Iterator[Iterator[Batch]]:
    """The batches from `images_seen` on; beside a device the next one is made while it works on the last."""
    size, device = trainer.spec.batch_size, trainer.accelerator.device
    if device.type == "cpu":
        yield (trainer.batch(seen) for seen in range(images_seen, 1 << 62, size))
        return
    make = _prefetch(trainer) if device.type == "cuda" else lambda seen: (trainer.batch(seen), lambda batch: batch)
    with ThreadPoolExecutor(1) as pool:

        def ahead() -> Iterator[Batch]:
            coming = pool.submit(make, images_seen)
            for seen in range(images_seen + size, 1 << 62, size):
                (batch, ready), coming = coming.result(), pool.submit(make, seen)
                yield ready(batch)

        yield ahead()


def _prefetch(trainer: Trainer) -> Callable[[int], tuple[Batch, Callable[[Batch], Batch]]]:
    """Batches made on a stream of their own, so that making one does not wait for the step before it."""
    stream = torch.cuda.Stream(trainer.accelerator.device)

    def make(seen: int) -> tuple[Batch, Callable[[Batch], Batch]]:
        with torch.cuda.stream(stream):
            batch, made = trainer.batch(seen), stream.record_event()

        def ready(batch: Batch) -> Batch:
            here = torch.cuda.current_stream()
            here.wait_event(made)
            for column in fields(batch):
                getattr(batch, column.name).record_stream(here)
            return batch

        return batch, ready

    return make


def _is_late(deadline: float | None, accelerator: Accelerator, at_log: bool) -> bool:
    """Whether the deadline has come, or SIGTERM, for any process; several look only where they meet anyway."""
    late = deadline_passed(deadline)
    if accelerator.num_processes == 1:
        return late
    if not at_log:
        return False
    return bool(accelerator.reduce(torch.tensor(float(late), device=accelerator.device), "sum") > 0)


def _mean_loss(losses: list[Tensor], accelerator: Accelerator, images_seen: int) -> float:
    mean = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
    if not math.isfinite(mean):
        raise RunError(
            f"the loss is {mean} near image {images_seen}; the last good state stays; lower train.lr or the precision"
        )
    return mean


@contextmanager
def _log(run: Path, images_seen: int, accelerator: Accelerator) -> Iterator[Callable[[dict[str, float]], None]]:
    """Lines of `loss.jsonl`, without those that a killed training wrote after its last durable state."""
    if not accelerator.is_main_process:
        yield lambda line: None
        return
    file = run / "loss.jsonl"
    if file.is_file():
        kept = [line for line in file.read_text().splitlines() if _images_of(line) <= images_seen]
        file.write_text("".join(f"{line}\n" for line in kept))
    with file.open("a", buffering=1) as stream:
        yield lambda line: print(json.dumps(line), file=stream)


def _images_of(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
