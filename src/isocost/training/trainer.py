"""The training loop of all objectives, on any number of processes. It resumes from the newest state and saves snapshots."""

from __future__ import annotations

import json
import logging
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
from isocost.training.distributed import DistributedModel, on_cpu, process_rows
from isocost.training.ema import Ema
from isocost.training.grad_accumulation import largest_microbatch
from isocost.training.lr_schedule import learning_rate
from isocost.training.objectives import Batch, Objective
from isocost.training.state_checkpoint import TrainingState, ema_weights, remove_partial
from isocost.utils.artifact_store import write_atomically
from isocost.utils.progress import progress_bar
from isocost.utils.signals import deadline_passed

logger = logging.getLogger(__name__)

SaveSnapshot = Callable[[nn.Module, Iterable[tuple[str, Tensor]], int], None]
"""(network, names and tensors of its EMA weights, images seen) -> saves a checkpoint."""
LOG_EVERY_STEPS = 20


class DeadlineReached(RunError):
    """The deadline has passed. The training state is saved, and the same command resumes."""


def train(
    spec: TrainSpec,
    objective: Objective,
    network: nn.Module,
    run_folder: Path,
    save_snapshot: SaveSnapshot,
    *,
    title: str,
    snapshots: tuple[int, ...] | None = None,
    deadline: float | None = None,
) -> None:
    """Train `network` until the last of `snapshots`, from the newest state in `run_folder` if there is one.

    The n-th image, its noise and its timestep are functions of (seed, n). An interrupted and an uninterrupted training
    therefore give the same bits on the same number of processes, and see the same images on any number of processes.

    Args:
        run_folder: holds the training states and `loss.jsonl`.
        save_snapshot: called on the main process at each snapshot with the network (for its config), the names and tensors
            of the EMA weights, and the snapshot's images seen.
        title: name of the training on the progress bar and in messages.
        snapshots: images seen, rising; None: only `spec.num_images`.
        deadline: `time.monotonic()` after which the state is saved and DeadlineReached raised.

    Raises:
        ConfigError: `spec.tracker` is not installed, or the batch size is not divisible by the number of processes.
        DeadlineReached: the deadline has passed before the last snapshot.
        RunError: the loss or a weight is not finite, or a state is damaged or cannot be written; the last durable state stays.
    """
    accelerator = make_accelerator(spec, run_folder, title)
    trainer = Trainer(spec, objective, network, run_folder, accelerator)
    images_seen = last_saved = trainer.training_state.load()
    trainer.check_weights(images_seen)
    if spec.cuda_graphs:
        trainer.record_graph(images_seen)
    pending = tuple(snapshot for snapshot in snapshots or (spec.num_images,) if spec.whole_batches(snapshot) >= images_seen)
    pending = trainer.save_due_snapshots(save_snapshot, pending, images_seen)
    losses: list[Tensor] = []
    with (
        _log(run_folder, images_seen, accelerator) as log,
        progress_bar(title, spec.num_images, "images", images_seen) as progress,
        _batches(trainer, images_seen) as batches,
    ):
        while pending:
            losses.append(trainer.step(next(batches), images_seen))
            images_seen += spec.batch_size
            snapshot_due, log_due = images_seen >= pending[0], len(losses) == LOG_EVERY_STEPS
            deadline_reached = _deadline_reached(deadline, accelerator, log_due or snapshot_due)
            save_due = snapshot_due or deadline_reached or images_seen - last_saved >= spec.state_every_images
            if log_due or save_due:
                mean = _mean_loss(losses, accelerator, images_seen)
                losses.clear()
                lr = learning_rate(spec, images_seen - spec.batch_size)
                log({"images_seen": images_seen, "loss": mean, "lr": lr})
                accelerator.log({"loss": mean, "lr": lr}, step=images_seen)
                progress(min(images_seen, spec.num_images), f"loss {mean:.4f}")
            if save_due:
                trainer.check_weights(images_seen)
                pending = trainer.save_due_snapshots(save_snapshot, pending, images_seen)
                trainer.training_state.save(images_seen, spec, accelerator)
                last_saved = images_seen
            if deadline_reached and pending:
                raise DeadlineReached(f"{title}: stopped at {images_seen} images; the same command resumes")
    for tracker in accelerator.trackers:
        tracker.finish()


class Trainer:
    """Network, optimizer, averages and training state of a training, and its single steps."""

    def __init__(
        self, spec: TrainSpec, objective: Objective, network: nn.Module, run_folder: Path, accelerator: Accelerator
    ) -> None:
        self.spec, self.objective, self.accelerator = spec, objective, accelerator
        self.rows = process_rows(spec, accelerator)
        self.model = DistributedModel(network, spec, accelerator)
        self.dtype = next(network.parameters()).dtype
        self.optimizer = torch.optim.AdamW(
            self.model.trainable_params.values(),
            lr=spec.lr,
            betas=spec.adam_betas,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        self.ema = Ema([shard.data for shard in self.model.param_shards()], spec.half_lives)
        self.training_state = TrainingState(self.model, self.optimizer, self.ema, run_folder)
        if accelerator.is_main_process:
            run_folder.mkdir(parents=True, exist_ok=True)
            remove_partial(run_folder)
        accelerator.wait_for_everyone()
        self.objective.on_train_start(dict(zip(self.ema.half_lives, self.ema.averages, strict=True)))
        self.microbatch = largest_microbatch(self.model, spec, objective, self.rows, self.dtype)
        self.graph_step: CudaGraphStep | None = None

    def batch(self, images_seen: int) -> Batch:
        """Return this process's rows of the batch that follows `images_seen` images."""
        return self.objective.batch(images_seen, self.rows, self.accelerator.device, self.dtype)

    def record_graph(self, images_seen: int) -> None:
        """Record a CUDA graph of a step; `step` replays it from now on.

        Call it after the state is restored and before batches are prefetched.

        Raises:
            ConfigError: there is no CUDA device, or the training has several processes.
        """
        if self.accelerator.device.type != "cuda" or self.accelerator.num_processes > 1:
            raise ConfigError("train.cuda_graphs needs a single process with a CUDA device; set train.cuda_graphs: false")
        self.graph_step = CudaGraphStep(self.optimizer, self._compute_gradients, self._optimizer_step, self.batch(images_seen))

    def step(self, batch: Batch, images_seen: int) -> Tensor:
        """Take a step of the optimizer and of the averages.

        Args:
            batch: this process's rows.
            images_seen: images before this step.

        Returns:
            The mean loss of this process's rows, a scalar on the device.
        """
        lr = learning_rate(self.spec, images_seen)
        if self.graph_step is not None:
            loss = self.graph_step(batch, lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = self._optimizer_step(batch)
        self.ema.update(images_seen + self.spec.batch_size, self.spec.batch_size)
        return loss

    def _optimizer_step(self, batch: Batch) -> Tensor:
        loss = self._compute_gradients(batch)
        self.model.clip_grad_norm(self.spec.max_grad_norm)
        self.optimizer.step()
        return loss

    def _compute_gradients(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return backward(self.model, self.objective, batch, self.microbatch, self.spec.dtype)

    @torch.no_grad()
    def check_weights(self, images_seen: int) -> None:
        """Check the weights and their averages before a snapshot or a state of them is saved. All processes must call it.

        Raises:
            RunError: a value is NaN or infinite, in any process.
        """
        tensors = [shard.data for shard in self.model.param_shards()]
        tensors += [tensor for average in self.ema.averages for tensor in average]
        num_bad = torch.stack([(~torch.isfinite(tensor)).any().float() for tensor in tensors]).sum()
        if float(self.accelerator.reduce(num_bad, "sum")) > 0:
            raise RunError(
                f"the weights contain NaN or inf after {images_seen} training images, so they are not saved; the last saved "
                "training state is unchanged; lower train.lr, or set train.dtype: fp32"
            )

    def save_due_snapshots(self, save_snapshot: SaveSnapshot, snapshots: tuple[int, ...], images_seen: int) -> tuple[int, ...]:
        """Save the snapshots that `images_seen` has reached; returns the others. All processes must call it.

        Raises:
            RunError: a checkpoint cannot be written.
        """
        for snapshot in (snapshot for snapshot in snapshots if snapshot <= images_seen):
            weights = ema_weights(self.model, self.ema)
            if self.accelerator.is_main_process:
                try:
                    save_snapshot(self.model.network, weights, snapshot)
                except OSError as error:
                    raise RunError(
                        f"the checkpoint at {snapshot} images cannot be written ({error}); the training state is kept"
                    ) from error
            for _ in weights:  # every process takes part in gathering
                pass
            self.accelerator.wait_for_everyone()
        return tuple(snapshot for snapshot in snapshots if snapshot > images_seen)


def backward(model: DistributedModel, objective: Objective, batch: Batch, microbatch: int, dtype: str) -> Tensor:
    """Accumulate the gradients of the mean loss over this process's rows.

    Args:
        microbatch: rows that go through the network at once.
        dtype: "bf16" runs the forward pass under autocast.

    Returns:
        The mean loss, a scalar on the device.
    """
    device = model.accelerator.device
    total = torch.zeros((), device=device)
    microbatches = list(batch.split(microbatch))
    for number, part in enumerate(microbatches, start=1):
        with model.no_sync_unless(number == len(microbatches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                loss = objective.loss(model.forward, part) * (len(part) / len(batch))
            loss.backward()
        total = total + loss.detach()
    return total


def make_accelerator(spec: TrainSpec, run_folder: Path, title: str) -> Accelerator:
    """Create the Accelerator, which knows the device and the other processes of the launch, and open the tracker.

    Raises:
        ConfigError: the tracker is not installed.
    """
    if spec.tracker != "none" and find_spec(spec.tracker) is None:
        raise ConfigError(
            f"train.tracker: {spec.tracker} is not installed; run pip install {spec.tracker}, or set train.tracker: none"
        )
    accelerator = Accelerator(
        cpu=on_cpu(),
        log_with=None if spec.tracker == "none" else spec.tracker,
        project_dir=str(run_folder / "tracker"),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    if spec.tracker != "none":
        config = spec.model_dump(mode="json").items()
        accelerator.init_trackers(title, config={k: str(v) if isinstance(v, list) else v for k, v in config})
    if spec.dtype == "bf16" and accelerator.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        logger.warning(
            "train.dtype: bf16 is slow here, because this processor has no bf16 matrix instructions; fp32 is many times faster"
        )
    return accelerator


@contextmanager
def _batches(trainer: Trainer, images_seen: int) -> Iterator[Iterator[Batch]]:
    """The batches from `images_seen` on. With an accelerator, the next batch is made while the accelerator takes a step."""
    batch_size, device = trainer.spec.batch_size, trainer.accelerator.device
    if device.type == "cpu":
        yield (trainer.batch(seen) for seen in range(images_seen, 1 << 62, batch_size))
        return
    make = _prefetch(trainer) if device.type == "cuda" else lambda seen: (trainer.batch(seen), lambda batch: batch)
    with ThreadPoolExecutor(1) as pool:

        def prefetched() -> Iterator[Batch]:
            next_batch = pool.submit(make, images_seen)
            for seen in range(images_seen + batch_size, 1 << 62, batch_size):
                (batch, wait_until_ready), next_batch = next_batch.result(), pool.submit(make, seen)
                yield wait_until_ready(batch)

        yield prefetched()


def _prefetch(trainer: Trainer) -> Callable[[int], tuple[Batch, Callable[[Batch], Batch]]]:
    """Make batches on a separate CUDA stream, so that they do not wait for the step before."""
    stream = torch.cuda.Stream(trainer.accelerator.device)

    def make(seen: int) -> tuple[Batch, Callable[[Batch], Batch]]:
        with torch.cuda.stream(stream):
            batch, event = trainer.batch(seen), stream.record_event()

        def wait_until_ready(batch: Batch) -> Batch:
            current_stream = torch.cuda.current_stream()
            current_stream.wait_event(event)
            for column in fields(batch):
                getattr(batch, column.name).record_stream(current_stream)
            return batch

        return batch, wait_until_ready

    return make


def _deadline_reached(deadline: float | None, accelerator: Accelerator, may_sync: bool) -> bool:
    """Whether the deadline has passed, or SIGTERM has come, in any process.

    Several processes check it only if `may_sync`: at steps where they wait for each other anyway.
    """
    reached = deadline_passed(deadline)
    if accelerator.num_processes == 1:
        return reached
    if not may_sync:
        return False
    return bool(accelerator.reduce(torch.tensor(float(reached), device=accelerator.device), "sum") > 0)


def _mean_loss(losses: list[Tensor], accelerator: Accelerator, images_seen: int) -> float:
    mean = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
    if not math.isfinite(mean):
        raise RunError(
            f"the mean loss is {mean} after {images_seen} training images; the last saved training state is unchanged; "
            "lower train.lr, or set train.dtype: fp32"
        )
    return mean


@contextmanager
def _log(run_folder: Path, images_seen: int, accelerator: Accelerator) -> Iterator[Callable[[dict[str, float]], None]]:
    """Open `loss.jsonl` for appending; lines that a killed training wrote after its last durable state are removed."""
    if not accelerator.is_main_process:
        yield lambda entry: None
        return
    file = run_folder / "loss.jsonl"
    if file.is_file():
        lines = [line for line in file.read_text(errors="replace").splitlines() if _logged_images_seen(line) <= images_seen]
        write_atomically(file, "".join(f"{line}\n" for line in lines))
    with file.open("a", buffering=1) as stream:
        yield lambda entry: print(json.dumps(entry), file=stream)


def _logged_images_seen(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
