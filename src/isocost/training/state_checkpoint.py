"""Training states: what a training needs to go on exactly where it stood, on any number of processes.

A state is a folder `state-<images>/`, published whole: the parts are written beside it and flushed, the manifest comes
last, then one rename; an older state goes only after the new one is durable.

part-<rank>.safetensors   this process's rows of weights, AdamW moments and every EMA, a tensor at a time
part-<rank>.json          which rows of which tensors they are, bytes and CRC-32 of the part
isocost.json              the manifest: images seen, number of parts
"""

from __future__ import annotations

import json
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
from isocost.models.streaming_safetensors import Plan, file_crc32, write_streamed
from isocost.training.distributed import DistributedModel, ParamShard
from isocost.training.ema import Ema
from isocost.utils.artifact_store import publish, read_manifest, write_json

_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Everything of a training that changes with its steps, and its way to disk and back."""

    def __init__(self, parallel: DistributedModel, optimizer: torch.optim.Optimizer, ema: Ema, run: Path) -> None:
        self.parallel, self.optimizer, self.ema, self.run = parallel, optimizer, ema, run

    def save(self, images_seen: int, spec: TrainSpec, accelerator: Accelerator) -> None:
        """Make a state durable, then remove those that the keep-rules let go. Every process takes part.

        Raises:
            RunError: the disk is full or cannot be written; the states before stay.
        """
        final = _folder(self.run, images_seen)
        partial = self.run / f".{final.name}"
        rank, writers = accelerator.process_index, accelerator.num_processes if self.parallel.is_sharded else 1
        try:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            accelerator.wait_for_everyone()
            if rank < writers:
                named = self._named()
                plan: Plan = [(key, tensor.dtype, tuple(tensor.shape)) for key, _, tensor in named]
                about = write_streamed(partial / f"part-{rank:05d}.safetensors", plan, (tensor for *_, tensor in named))
                rows = {key: [piece.start, piece.stop] for key, piece, _ in named}
                write_json(partial / f"part-{rank:05d}.json", {**about, "rows": rows})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                publish(partial, final, {"kind": "state", "images_seen": images_seen, "num_parts": writers})
                _prune(self.run, spec, images_seen)
            accelerator.wait_for_everyone()
        except OSError as error:
            raise RunError(
                f"{final}: the training state cannot be written ({error}); the last whole one stays, and the same command goes "
                "on from it once there is room"
            ) from error

    def load(self) -> int:
        """Restore the newest whole state; returns the images seen, 0 where there is no state.

        Raises:
            RunError: the state is damaged.
        """
        states = _states(self.run)
        if not states:
            return 0
        newest = states[-1]
        try:
            manifest = read_manifest(newest)
            self._restore(_Parts(newest, manifest["num_parts"]))
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            back = f"go on from {states[-2].name}" if len(states) > 1 else "train from the start"
            raise RunError(f"{newest}: the training state does not read back ({error}); remove it to {back}") from error
        return int(manifest["images_seen"])

    def _named(self) -> list[tuple[str, ParamShard, Tensor]]:
        """Name in the file, piece that it belongs to, and rows of every tensor of the state, a scalar as one row."""
        named = []
        parameters = list(self.parallel.trainable_params.values())
        for number, piece in enumerate(self.parallel.pieces()):
            state = self.optimizer.state[parameters[number]]
            named.append((f"network.{piece.name}", piece, piece.data))
            for key in _MOMENTS:
                moment = state[key]
                named.append((f"{key}.{piece.name}", piece, moment.to_local() if hasattr(moment, "to_local") else moment))
            for half_life, average in zip(self.ema.half_lives, self.ema.averages, strict=True):
                named.append((f"ema.{half_life}.{piece.name}", piece, average[number]))
        first = self.optimizer.state[parameters[0]]
        named.append(("step", ParamShard("step", (1,), 0, 1, first["step"]), first["step"].reshape(1)))
        return named

    @torch.no_grad()
    def _restore(self, parts: _Parts) -> None:
        parameters = list(self.parallel.trainable_params.values())
        step = parts.rows("step", ParamShard("step", (1,), 0, 1, torch.empty(1)))[0]
        for number, piece in enumerate(self.parallel.pieces()):
            piece.data.copy_(parts.rows(f"network.{piece.name}", piece))
            parameter = parameters[number]
            # Moments are laid out in memory as their parameter is: a fused optimizer walks both in memory order.
            moments = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in _MOMENTS}
            for key, moment in moments.items():
                local = moment.to_local() if hasattr(moment, "to_local") else moment
                local.copy_(parts.rows(f"{key}.{piece.name}", piece))
            self.optimizer.state[parameter] = {"step": step.to(parameter.device, copy=True), **moments}
            for half_life, average in zip(self.ema.half_lives, self.ema.averages, strict=True):
                average[number].copy_(parts.rows(f"ema.{half_life}.{piece.name}", piece))


class _Parts:
    """The parts of a state, checked, and any rows of its tensors."""

    def __init__(self, folder: Path, num_parts: int) -> None:
        self.files, self.rows_in = [], []
        for number in range(num_parts):
            file = folder / f"part-{number:05d}.safetensors"
            about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            if file.stat().st_size != about["bytes"] or file_crc32(file) != about["crc32"]:
                raise ValueError(f"{file.name} is not what was written")
            self.files.append(safe_open(file, "pt"))
            self.rows_in.append(about["rows"])

    def rows(self, key: str, piece: ParamShard) -> Tensor:
        """The rows of `piece` of the tensor called `key`, from whichever parts hold them."""
        found: list[Any] = []
        for file, rows in zip(self.files, self.rows_in, strict=True):
            start, stop = rows[key]
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                found.append(file.get_slice(key)[first - start : last - start] if piece.shape else file.get_tensor(key))
        if not found:
            return torch.empty_like(piece.data)
        return found[0] if len(found) == 1 else torch.cat(found)


def newest_state(run: Path) -> int:
    """Images seen at the newest whole state in the folder `run`; 0 where there is none."""
    states = _states(run)
    return _images(states[-1]) if states else 0


def remove_partial(run: Path) -> None:
    """Remove what a killed training left unfinished."""
    for leftover in run.glob(".state-*"):
        shutil.rmtree(leftover)


def _prune(run: Path, spec: TrainSpec, newest: int) -> None:
    states = _states(run)
    every = spec.keep_state_every_images
    for folder in states[: -spec.keep_last_states]:
        images = _images(folder)
        crossed = every is not None and images // every > (images - spec.batch_size) // every
        if not crossed and images != newest:
            shutil.rmtree(folder)


def _states(run: Path) -> list[Path]:
    return sorted(run.glob("state-*"))


def _images(state: Path) -> int:
    return int(state.name.removeprefix("state-"))


def _folder(run: Path, images_seen: int) -> Path:
    return run / f"state-{images_seen:012d}"


def averaged(parallel: DistributedModel, ema: Ema) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of every parameter, the published average of those that learn, one by one on the CPU.

    Every process must go through all.
    """
    learned = parallel.gather(ema.averages[0])
    for name, parameter in parallel.network.named_parameters():
        yield name, next(learned) if parameter.requires_grad else parameter.detach().cpu()
