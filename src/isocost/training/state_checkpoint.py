"""Save and restore training states, from which a training resumes exactly, on any number of processes.

A training state is a folder `state-<images>/` that appears atomically: the parts are written to a temporary folder and flushed,
then the manifest, then the folder is renamed. An older state is removed only after the new one is durable.

part-<rank>.safetensors   this process's rows of weights, AdamW moments and every EMA, written one tensor at a time
part-<rank>.json          the rows of each tensor in the part, its bytes and its CRC-32
isocost.json              the manifest: images seen, number of parts
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isocost.config.training import TrainSpec
from isocost.errors import RunError
from isocost.models.streaming_safetensors import TensorLayout, file_crc32, write_streamed
from isocost.training.distributed import DistributedModel, ParamShard
from isocost.training.ema import Ema
from isocost.utils.artifact_store import publish, read_manifest, write_json

_STATE_NAME = re.compile(r"state-[0-9]{12}")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Weights, moments and averages of a training; saves them to `run_folder` and restores them."""

    def __init__(self, model: DistributedModel, optimizer: torch.optim.Optimizer, ema: Ema, run_folder: Path) -> None:
        self.model, self.optimizer, self.ema, self.run_folder = model, optimizer, ema, run_folder

    def save(self, images_seen: int, spec: TrainSpec, accelerator: Accelerator) -> None:
        """Write a durable state, then remove the old states that `spec` does not retain. All processes must call it.

        Raises:
            RunError: the disk is full or not writable; earlier states stay.
        """
        final = _state_folder(self.run_folder, images_seen)
        partial = self.run_folder / f".{final.name}"
        rank, num_parts = accelerator.process_index, accelerator.num_processes if self.model.is_sharded else 1
        try:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            if rank < num_parts:
                named = self._named_tensors()
                layout: TensorLayout = [(key, tensor.dtype, tuple(tensor.shape)) for key, _, tensor in named]
                info = write_streamed(partial / f"part-{rank:05d}.safetensors", layout, (tensor for *_, tensor in named))
                rows = {key: [shard.start, shard.stop] for key, shard, _ in named}
                write_json(partial / f"part-{rank:05d}.json", {**info, "rows": rows})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                publish(
                    partial, final, {"kind": "state", "images_seen": images_seen, "num_parts": num_parts}, with_checksums=False
                )
                _prune(self.run_folder, spec, images_seen)
            accelerator.wait_for_everyone()
        except OSError as error:
            raise RunError(
                f"{final}: the training state cannot be written ({error}); free some disk space, and the same command resumes "
                "from the last complete state"
            ) from error

    def load(self) -> int:
        """Restore the newest complete state; returns the images seen, 0 if there is no state.

        Raises:
            RunError: the state is damaged.
        """
        states = _state_folders(self.run_folder)
        if not states:
            return 0
        newest = states[-1]
        try:
            manifest = read_manifest(newest)
            images_seen = int(manifest["images_seen"])
            self._restore(_StateParts(newest, manifest["num_parts"]))
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            fallback = f"resume from {states[-2].name}" if len(states) > 1 else "train from the start"
            raise RunError(f"{newest}: the training state cannot be read ({error}); remove it to {fallback}") from error
        return images_seen

    def _named_tensors(self) -> list[tuple[str, ParamShard, Tensor]]:
        """List every tensor of the state: its name in the file, its shard, and the rows; a scalar is a single row."""
        named = []
        parameters = list(self.model.trainable_params.values())
        for number, shard in enumerate(self.model.param_shards()):
            moments = self.optimizer.state[parameters[number]]
            named.append((f"network.{shard.name}", shard, shard.data))
            for key in _MOMENTS:
                moment = moments[key]
                named.append((f"{key}.{shard.name}", shard, moment.to_local() if hasattr(moment, "to_local") else moment))
            for half_life, average in zip(self.ema.half_lives, self.ema.averages, strict=True):
                named.append((f"ema.{half_life}.{shard.name}", shard, average[number]))
        first = self.optimizer.state[parameters[0]]
        named.append(("step", ParamShard("step", (1,), 0, 1, first["step"]), first["step"].reshape(1)))
        return named

    @torch.no_grad()
    def _restore(self, parts: _StateParts) -> None:
        parameters = list(self.model.trainable_params.values())
        step = parts.rows("step", ParamShard("step", (1,), 0, 1, torch.empty(1)))[0]
        for number, shard in enumerate(self.model.param_shards()):
            shard.data.copy_(parts.rows(f"network.{shard.name}", shard))
            parameter = parameters[number]
            # Moments have the memory layout of their parameter: a fused optimizer walks both in memory order.
            moments = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in _MOMENTS}
            for key, moment in moments.items():
                local = moment.to_local() if hasattr(moment, "to_local") else moment
                local.copy_(parts.rows(f"{key}.{shard.name}", shard))
            self.optimizer.state[parameter] = {"step": step.to(parameter.device, copy=True), **moments}
            for half_life, average in zip(self.ema.half_lives, self.ema.averages, strict=True):
                average[number].copy_(parts.rows(f"ema.{half_life}.{shard.name}", shard))


class _StateParts:
    """Reads any rows of the tensors of a state, from parts that were checked."""

    def __init__(self, folder: Path, num_parts: int) -> None:
        self.files, self.part_rows = [], []
        for number in range(num_parts):
            file = folder / f"part-{number:05d}.safetensors"
            info = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            if file.stat().st_size != info["bytes"] or file_crc32(file) != info["crc32"]:
                raise ValueError(f"{file.name} does not match its size or checksum")
            self.files.append(safe_open(file, "pt"))
            self.part_rows.append(info["rows"])

    def rows(self, key: str, shard: ParamShard) -> Tensor:
        """Read the rows of `shard` of the tensor `key` from the parts that hold them."""
        pieces: list[Any] = []
        for file, rows in zip(self.files, self.part_rows, strict=True):
            start, stop = rows[key]
            first, last = max(start, shard.start), min(stop, shard.stop)
            if first < last:
                pieces.append(file.get_slice(key)[first - start : last - start] if shard.shape else file.get_tensor(key))
        if not pieces:
            return torch.empty_like(shard.data)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def newest_state_images(run_folder: Path) -> int:
    """Return the images seen at the newest complete state of a run; 0 if there is none."""
    states = _state_folders(run_folder)
    return _images_seen_at(states[-1]) if states else 0


def remove_partial(run_folder: Path) -> None:
    """Remove incomplete states of a killed training."""
    for leftover in [*run_folder.glob(".state-*"), *run_folder.glob("old-.state-*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)


def _prune(run_folder: Path, spec: TrainSpec, newest: int) -> None:
    states = _state_folders(run_folder)
    every = spec.keep_state_every_images
    for folder in states[: -spec.keep_last_states]:
        images = _images_seen_at(folder)
        is_permanent = every is not None and images // every > (images - spec.batch_size) // every
        if not is_permanent and images != newest:
            shutil.rmtree(folder)


def _state_folders(run_folder: Path) -> list[Path]:
    """The complete states, oldest first. Other files and folders are ignored."""
    folders = run_folder.glob("state-*") if run_folder.is_dir() else ()
    return sorted(folder for folder in folders if _STATE_NAME.fullmatch(folder.name) and folder.is_dir())


def _images_seen_at(state: Path) -> int:
    return int(state.name.removeprefix("state-"))


def _state_folder(run_folder: Path, images_seen: int) -> Path:
    return run_folder / f"state-{images_seen:012d}"


def ema_weights(model: DistributedModel, ema: Ema) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full tensor of every parameter on the CPU: the first EMA of trainable parameters, frozen ones unchanged.

    All processes must iterate to the end.
    """
    averages = model.gather(ema.averages[0])
    for name, parameter in model.network.named_parameters():
        yield name, next(averages) if parameter.requires_grad else parameter.detach().cpu()
