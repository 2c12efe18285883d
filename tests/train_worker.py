"""The processes of the tests in test_distributed.py: all run a list of jobs together.

torchrun --nproc-per-node 2 tests/train_worker.py jobs.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isocost.config.model import ModelSpec
from isocost.config.training import TrainSpec
from isocost.data.latent_cache import LatentCache
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.models.unet import build_unet
from isocost.training.distributed import process_info
from isocost.training.memory_estimate import training_memory
from isocost.training.objectives import Batch, TextToImage
from isocost.training.throughput_estimate import RandomObjective
from isocost.training.trainer import Trainer, backward, make_accelerator, train

MODEL = ModelSpec(width=8, latent_channels=4, latent_size=8, cross_attention_dim=384, layers_per_block=1, num_levels=2)


class RecordingObjective(TextToImage):
    """Records the images that each process trains on."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[int] = []

    def batch(self, images_seen: int, rows: range, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        self.seen += [images_seen + row for row in rows]
        return super().batch(images_seen, rows, device, dtype)


def network_of(spec: TrainSpec, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(spec.seed)
    return build_unet(MODEL).to(dtype)


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process in bytes, now or the peak since `clear_refs`."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure_memory(spec: TrainSpec, model: ModelSpec, folder: Path, rank: int) -> None:
    """Take two steps on random numbers; write the estimated and the measured peak memory.

    A small network comes first: it makes PyTorch load the libraries that it loads once per process.
    """
    accelerator = make_accelerator(spec, folder, "test")
    small = ModelSpec(width=8, latent_size=8)
    first = Trainer(spec, RandomObjective(small, 77), build_unet(small), folder, accelerator)
    first.step(first.batch(0), 0)
    del first
    before = resident_bytes()
    torch.manual_seed(0)
    network = build_unet(model, "cpu" if rank == 0 else "meta")
    trainer = Trainer(spec, RandomObjective(model, 77), network, folder, accelerator)
    losses = [float(trainer.step(trainer.batch(0), 0))]
    Path("/proc/self/clear_refs").write_text("5")
    losses.append(float(trainer.step(trainer.batch(0), spec.batch_size)))
    measured = resident_bytes(peak=True) - before
    estimate = training_memory(model, spec, trainer.microbatch, 77, accelerator.num_processes)
    report = {"measured": measured, "estimated": estimate.total, "state": estimate.state, "losses": losses}
    num_shard_parameters = sum(shard.data.numel() for shard in trainer.model.param_shards())
    report |= {"shard_parameters": num_shard_parameters, "parameters": sum(p.numel() for p in network.parameters())}
    (folder / f"memory-{rank}.json").write_text(json.dumps(report))


def run_job(job: dict[str, Any]) -> list[float] | None:
    """Run the training of a job; its folder then has the saved weights and the images of each process.

    A job with `losses` saves nothing; it returns the losses of so many steps.
    """
    spec, folder = TrainSpec.model_validate(job["spec"]), Path(job["folder"])
    dtype = torch.float64 if job.get("double") else torch.float32
    rank = process_info().rank

    def save_snapshot(network: nn.Module, weights: Iterable[tuple[str, Tensor]], snapshot: int) -> None:
        save_file({name: tensor.clone().contiguous() for name, tensor in weights}, folder / f"weights-{snapshot}.safetensors")

    if "memory" in job:
        model = ModelSpec.model_validate(job["memory"])
        measure_memory(spec, model, folder, rank)
        return None
    objective = RecordingObjective(spec, LatentCache(job["cache"]), NoiseSchedule.scaled_linear())
    if "losses" in job:
        trainer = Trainer(spec, objective, network_of(spec, dtype), folder, make_accelerator(spec, folder, "test"))
        seen = range(0, job["losses"] * spec.batch_size, spec.batch_size)
        return [float(trainer.step(trainer.batch(images), images)) for images in seen]
    if job.get("gradients"):
        trainer = Trainer(spec, objective, network_of(spec, dtype), folder, make_accelerator(spec, folder, "test"))
        loss = backward(trainer.model, objective, trainer.batch(0), trainer.microbatch, spec.dtype)
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in trainer.model.network.parameters()]
        names = [name for name, _ in trainer.model.network.named_parameters()]
        gradients = dict(zip(names, [grad.clone().contiguous() for grad in trainer.model.gather(grads)], strict=True))
        gradients["loss"] = trainer.accelerator.reduce(loss, "mean").reshape(1)
        if rank == 0:
            save_file(gradients, folder / "gradients.safetensors")
        return None
    snapshots = tuple(job.get("snapshots", (spec.num_images,)))
    train(spec, objective, network_of(spec, dtype), folder, save_snapshot, title="test", snapshots=snapshots)
    (folder / f"seen-{rank}-{spec.num_images}.json").write_text(json.dumps(objective.seen))
    return None


def main() -> None:
    """Run every job of the file."""
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run_job(job)
        process_info().wait()


if __name__ == "__main__":
    main()
