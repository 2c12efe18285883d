"""Images a second: diffusers' train_text_to_image.py way against the loop, the same U-Net, data, batch and optimizer's rule.

    python benchmarks/training.py [--quick] [--json] [--images 'aerial/train-*.tar'] [--compile]

The set-up of studies/aerial.yaml: images of 64 x 64, latents of 16 x 8 x 8, 40 tokens, batch 64, v-prediction, EMA, fp32. The
script's way reads, decodes, flips and tokenizes images and captions with `datasets` and a DataLoader, and runs an autoencoder
(channels 16-32-64-64, the fashion study's with one level more) and MiniLM in every step, as examples/text_to_image does with
its own. It is then given one measure after the other, until it differs from ours by the loop alone. All ways run in turns
within one process. Random weights: this measures time, never quality. The last line is JSON.
"""

from __future__ import annotations

import argparse
import glob
import io
import itertools
import json
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from results import at_least, print_results, row
from torch import Tensor
from torchvision import transforms

from isocost.config.data import ScenesSource
from isocost.config.model import ModelSpec, TextEncoderSpec, TrainedAutoencoderSpec
from isocost.config.training import TrainSpec
from isocost.data.datasets import Sample
from isocost.data.latent_cache import LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.models.autoencoder import DiffusersVAE
from isocost.models.flops import model_cost
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.models.unet import build_unet
from isocost.training.autoencoder import build_autoencoder
from isocost.training.objectives import TextToImage, training_schedule
from isocost.training.trainer import Trainer, make_accelerator

WIDTHS, RESOLUTION, NUM_IMAGES = (16, 64), 64, 128
AUTOENCODER = TrainedAutoencoderSpec(kind="kl", block_widths=(16, 32, 64, 64), num_channels=16, num_images=1)
TEXT = TextEncoderSpec(max_tokens=40)
SPEC = TrainSpec(
    num_images=1 << 40,
    batch_size=64,
    lr=5e-4,
    adam_betas=(0.9, 0.99),
    warmup_images=10_000,
    prediction_type="v_prediction",
    ema_half_life_images=50_000,
    state_every_images=1 << 40,
)
WAYS = ("script", "latents cached", "states cached", "fused AdamW", "channels last", "ours")
"""The script's way, and what is added to it from left to right; `ours` adds the loop itself."""

Step = Callable[[], None]


def read_images(pattern: str | None) -> Dataset:
    """`NUM_IMAGES` encoded images with captions: of tar shards, or the embedded scenes as PNG."""
    columns: dict[str, list[Any]] = {"image": [], "text": []}
    for file in sorted(glob.glob(pattern or "")):
        with tarfile.open(file) as shard:
            for member in shard:
                data = shard.extractfile(member)
                if data is None or len(columns["text"]) == NUM_IMAGES:
                    continue
                if member.name.endswith(".json"):
                    columns["text"].append(json.load(data)["captions"])
                else:
                    columns["image"].append({"bytes": data.read(), "path": None})
    if pattern and not columns["text"]:
        sys.exit(f"--images {pattern}: no images there")
    if not pattern:
        scenes = load_images(ScenesSource(kind="scenes", num_images=NUM_IMAGES), RESOLUTION, 0)
        for image, captions in zip(scenes.images, scenes.captions, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            columns["image"].append({"bytes": buffer.getvalue(), "path": None})
            columns["text"].append(list(captions))
    columns["image"] = columns["image"][: len(columns["text"])]
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def make_cache(place: ShardStore, images: Dataset, autoencoder: DiffusersVAE, text: MiniLMTextEncoder) -> LatentCache:
    """Our cache of the same images."""

    def read(wanted: Callable[[int], bool]) -> Iterator[Sample]:
        for number, item in enumerate(images):
            image = item["image"].convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
            yield Sample(str(number), np.asarray(image), tuple(item["text"]))

    write_index(place, write_cache(place, read, autoencoder, text))
    return LatentCache(place)


class Script:
    """A step of examples/text_to_image/train_text_to_image.py with --use_ema, as far as `way` leaves it."""

    def __init__(
        self,
        way: str,
        model: ModelSpec,
        images: Dataset,
        autoencoder: DiffusersVAE,
        text: MiniLMTextEncoder,
        cache: LatentCache,
    ) -> None:
        has = {measure: WAYS.index(measure) <= WAYS.index(way) for measure in WAYS}
        self.autoencoder, self.text_encoder, self.cache, self.has = autoencoder, text, cache, has
        self.accelerator = Accelerator(cpu=True)
        network = build_unet(model).train()
        if has["channels last"]:
            network.to(memory_format=torch.channels_last)
        self.ema = EMAModel(network.parameters(), model_cls=type(network), model_config=network.config)
        options: dict[str, Any] = {"fused": True} if has["fused AdamW"] else {}
        optimizer = torch.optim.AdamW(network.parameters(), lr=SPEC.lr, betas=SPEC.adam_betas, weight_decay=0.01, **options)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) * 64 / SPEC.warmup_images))
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=SPEC.prediction_type
        )
        side = transforms.InterpolationMode.BILINEAR
        self.transform = transforms.Compose(
            [
                transforms.Resize(RESOLUTION, interpolation=side),
                transforms.CenterCrop(RESOLUTION),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        rows = Dataset.from_dict({"n": list(range(len(images)))}) if has["states cached"] else images
        rows = rows.with_transform(self._numbers if has["states cached"] else self._preprocess)
        loader = torch.utils.data.DataLoader(rows, SPEC.batch_size, shuffle=True, collate_fn=self._collate)
        self.network, self.optimizer, self.loader, self.rate = self.accelerator.prepare(network, optimizer, loader, rate)
        self.batches = self._forever()
        self.train_loss = 0.0

    def _preprocess(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        captions = [random.choice(several) for several in examples["text"]]
        made: dict[str, list[Any]] = {"input_ids": list(torch.from_numpy(self.text_encoder.tokenize(captions)))}
        if not self.has["latents cached"]:
            made["pixel_values"] = [self.transform(image.convert("RGB")) for image in examples["image"]]
        else:
            made["n"] = [random.randrange(len(self.cache)) for _ in captions]
        return made

    def _numbers(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return examples

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        return {k: torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v) for k, v in columns.items()}

    def _forever(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader

    def _latents(self, batch: dict[str, Tensor]) -> Tensor:
        if self.has["latents cached"]:
            mean, std = self.cache.moments(batch["n"])
            return mean + std * torch.randn_like(mean)
        with torch.no_grad():
            return self.autoencoder.network.encode(batch["pixel_values"]).latent_dist.sample() * self.autoencoder.scale

    def _states(self, batch: dict[str, Tensor]) -> Tensor:
        if self.has["states cached"]:
            return self.cache.states(self.cache.captions(batch["n"])[:, 0])
        with torch.no_grad():
            return self.text_encoder.network(batch["input_ids"].long(), return_dict=False)[0]

    def __call__(self) -> None:
        batch = next(self.batches)
        latents = self._latents(batch)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),)).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        states = self._states(batch)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.network(noisy, timesteps, states, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
        self.train_loss += self.accelerator.gather(loss.repeat(SPEC.batch_size)).mean().item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())


def our_way(model: ModelSpec, cache: LatentCache, run: Path, compiled: bool) -> Step:
    """A step of the loop."""
    spec = SPEC.model_copy(update={"compile": compiled})
    task = TextToImage(spec, cache, training_schedule(spec))
    trainer = Trainer(spec, task, build_unet(model), run, make_accelerator(spec, run, "benchmark"))
    seen = 0

    def step() -> None:
        nonlocal seen
        trainer.step(trainer.batch(seen), seen)
        seen += spec.batch_size

    return step


def measure(width: int, turns: int, images: Dataset, compiled: bool, told: Callable[[str], None]) -> list[dict[str, Any]]:
    """Images a second of every way, and what each measure gains over the way before it."""
    torch.manual_seed(0)
    model = ModelSpec(width=width, latent_channels=16, latent_size=8, cross_attention_dim=384)
    autoencoder, text = DiffusersVAE(build_autoencoder(AUTOENCODER, RESOLUTION)), MiniLMTextEncoder(TEXT)
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(ShardStore(f"{folder}/cache"), images, autoencoder, text)
        steps: dict[str, Step] = {way: Script(way, model, images, autoencoder, text, cache) for way in WAYS[:-1]}
        steps["ours"] = our_way(model, cache, Path(folder) / "run", False)
        if compiled:
            steps["ours, compiled"] = our_way(model, cache, Path(folder) / "compiled", True)
        seconds: dict[str, list[float]] = {way: [] for way in steps}
        for turn in range(turns + 1):
            for way, step in steps.items():
                started = time.perf_counter()
                step()
                if turn:
                    seconds[way].append(time.perf_counter() - started)
            if turn:
                told(f"width {width}: " + ", ".join(f"{way} {times[-1]:.2f} s" for way, times in seconds.items()))
    name = f"width {width}"
    rows = [row(f"{name}: {way}", [SPEC.batch_size / s for s in times], "images/s") for way, times in seconds.items()]
    order = list(seconds)
    for before, way in itertools.pairwise(order):
        rows.append(row(f"{name}: gain of {way} over {before}", ratios(seconds[before], seconds[way]), "ratio"))
    rows.append(row(f"{name}: ours over script", ratios(seconds["script"], seconds["ours"]), "ratio"))
    rows.append(
        row(f"{name}: ours over script, caches on both sides", ratios(seconds["states cached"], seconds["ours"]), "ratio")
    )
    gflop = 3 * model_cost(model, TEXT.max_tokens).gflop_per_forward * SPEC.batch_size
    rows.append(row(f"{name}: ours, network alone", [gflop / s for s in seconds["ours"]], "GFLOP/s"))
    return rows


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """Turn by turn."""
    return [one / other for one, other in zip(theirs, ours, strict=True)]


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="one width, three turns, under a minute")
    options.add_argument("--turns", type=int, default=7, help="turns of all ways, one step of each; the first is not counted")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    options.add_argument("--compile", action="store_true", help="the compiled loop as well: minutes of compiling")
    options.add_argument("--images", help="tar shards of images with captions; the embedded scenes where absent")
    asked = options.parse_args()

    def told(line: str) -> None:
        if not asked.json:
            print(line, file=sys.stderr, flush=True)

    images = read_images(asked.images)
    rows = []
    for width in WIDTHS[:1] if asked.quick else WIDTHS:
        rows += measure(width, 3 if asked.quick else asked.turns, images, asked.compile, told)
    print_results("training", rows, at_least(rows, {f"width {width}: ours over script": 3.0 for width in WIDTHS}))


if __name__ == "__main__":
    main()
