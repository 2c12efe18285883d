"""Training: images/s of diffusers' train_text_to_image.py and of the trainer, with the same U-Net, data, batch and optimizer.

    python benchmarks/training.py [--quick] [--json] [--images 'aerial/train-*.tar'] [--compile]

The setting is that of studies/aerial.yaml: images of 64 x 64, latents of 16 x 8 x 8, 40 tokens, batch 64, v-prediction, EMA,
fp32. The script reads, decodes, flips and tokenizes images and captions with `datasets` and a DataLoader, and runs an
autoencoder (channels 16-32-64-64, that of the fashion study with one more level) and MiniLM in every step, as in
examples/text_to_image. Then optimizations of isocost are added to the script one by one, until only the loop differs. All
ways run in turns within one process. Weights are random, so only time is measured, not quality. The last line is JSON.
"""

from __future__ import annotations

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
from results import Row, argument_parser, at_least, print_results, row
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
TEXT_ENCODER = TextEncoderSpec(max_tokens=40)
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
SCRIPT, CACHED_LATENTS, CACHED_EMBEDS, ISOCOST = "script", "cached latents", "cached prompt embeddings", "isocost"
FUSED, CHANNELS_LAST = "fused AdamW", "channels last"
WAYS = (SCRIPT, CACHED_LATENTS, CACHED_EMBEDS, FUSED, CHANNELS_LAST, ISOCOST)
"""The script, and what is added to it from left to right; `isocost` also replaces the loop."""

Step = Callable[[], None]


def read_images(pattern: str | None) -> Dataset:
    """`NUM_IMAGES` encoded images with captions: from tar shards, or synthetic scenes as PNG if no pattern is given."""
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


def make_cache(store: ShardStore, images: Dataset, autoencoder: DiffusersVAE, text_encoder: MiniLMTextEncoder) -> LatentCache:
    """isocost's latent cache of the same images."""

    def read(is_needed: Callable[[int], bool]) -> Iterator[Sample]:
        for number, item in enumerate(images):
            image = item["image"].convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
            yield Sample(str(number), np.asarray(image), tuple(item["text"]))

    write_index(store, write_cache(store, read, autoencoder, text_encoder))
    return LatentCache(store)


class Script:
    """A step of examples/text_to_image/train_text_to_image.py with --use_ema and the optimizations up to `way`."""

    def __init__(
        self,
        way: str,
        model: ModelSpec,
        images: Dataset,
        autoencoder: DiffusersVAE,
        text_encoder: MiniLMTextEncoder,
        cache: LatentCache,
    ) -> None:
        has = {optimization: WAYS.index(optimization) <= WAYS.index(way) for optimization in WAYS}
        self.autoencoder, self.text_encoder, self.cache, self.has = autoencoder, text_encoder, cache, has
        self.accelerator = Accelerator(cpu=True)
        network = build_unet(model).train()
        if has[CHANNELS_LAST]:
            network.to(memory_format=torch.channels_last)
        self.ema = EMAModel(network.parameters(), model_cls=type(network), model_config=network.config)
        options: dict[str, Any] = {"fused": True} if has[FUSED] else {}
        optimizer = torch.optim.AdamW(network.parameters(), lr=SPEC.lr, betas=SPEC.adam_betas, weight_decay=0.01, **options)
        lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) * 64 / SPEC.warmup_images))
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=SPEC.prediction_type
        )
        self.transform = transforms.Compose(
            [
                transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(RESOLUTION),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        dataset = Dataset.from_dict({"index": list(range(len(images)))}) if has[CACHED_EMBEDS] else images
        dataset = dataset.with_transform(self._keep_indices if has[CACHED_EMBEDS] else self._preprocess)
        loader = torch.utils.data.DataLoader(dataset, SPEC.batch_size, shuffle=True, collate_fn=self._collate)
        self.network, self.optimizer, self.loader, self.lr_scheduler = self.accelerator.prepare(
            network, optimizer, loader, lr_scheduler
        )
        self.batches = self._endless_batches()
        self.train_loss = 0.0

    def _preprocess(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        captions = [random.choice(image_captions) for image_captions in examples["text"]]
        columns: dict[str, list[Any]] = {"input_ids": list(torch.from_numpy(self.text_encoder.tokenize(captions)))}
        if not self.has[CACHED_LATENTS]:
            columns["pixel_values"] = [self.transform(image.convert("RGB")) for image in examples["image"]]
        else:
            columns["index"] = [random.randrange(len(self.cache)) for _ in captions]
        return columns

    def _keep_indices(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return examples

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        return {k: torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v) for k, v in columns.items()}

    def _endless_batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader

    def _latents(self, batch: dict[str, Tensor]) -> Tensor:
        if self.has[CACHED_LATENTS]:
            mean, std = self.cache.moments(batch["index"])
            return mean + std * torch.randn_like(mean)
        with torch.no_grad():
            return self.autoencoder.network.encode(batch["pixel_values"]).latent_dist.sample() * self.autoencoder.scale

    def _prompt_embeds(self, batch: dict[str, Tensor]) -> Tensor:
        if self.has[CACHED_EMBEDS]:
            return self.cache.prompt_embeds(self.cache.captions(batch["index"])[:, 0])
        with torch.no_grad():
            return self.text_encoder.network(batch["input_ids"].long(), return_dict=False)[0]

    def __call__(self) -> None:
        batch = next(self.batches)
        latents = self._latents(batch)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),)).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prompt_embeds = self._prompt_embeds(batch)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.network(noisy, timesteps, prompt_embeds, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
        self.train_loss += self.accelerator.gather(loss.repeat(SPEC.batch_size)).mean().item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())


def isocost_step(model: ModelSpec, cache: LatentCache, folder: Path, compiled: bool) -> Step:
    """A step of the trainer."""
    spec = SPEC.model_copy(update={"compile": compiled})
    objective = TextToImage(spec, cache, training_schedule(spec))
    trainer = Trainer(spec, objective, build_unet(model), folder, make_accelerator(spec, folder, "benchmark"))
    images_seen = 0

    def step() -> None:
        nonlocal images_seen
        trainer.step(trainer.batch(images_seen), images_seen)
        images_seen += spec.batch_size

    return step


def measure(width: int, turns: int, images: Dataset, compiled: bool, log: Callable[[str], None]) -> list[Row]:
    """Images/s of every way, and the speed-up of each optimization."""
    torch.manual_seed(0)
    model = ModelSpec(width=width, latent_channels=16, latent_size=8, cross_attention_dim=384)
    autoencoder = DiffusersVAE(build_autoencoder(AUTOENCODER, RESOLUTION))
    text_encoder = MiniLMTextEncoder(TEXT_ENCODER)
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(ShardStore(f"{folder}/cache"), images, autoencoder, text_encoder)
        steps: dict[str, Step] = {way: Script(way, model, images, autoencoder, text_encoder, cache) for way in WAYS[:-1]}
        steps[ISOCOST] = isocost_step(model, cache, Path(folder) / "run", False)
        if compiled:
            steps[f"{ISOCOST}, compiled"] = isocost_step(model, cache, Path(folder) / "compiled", True)
        seconds: dict[str, list[float]] = {way: [] for way in steps}
        for turn in range(turns + 1):
            for way, step in steps.items():
                started = time.perf_counter()
                step()
                if turn:
                    seconds[way].append(time.perf_counter() - started)
            if turn:
                log(f"width {width}: " + ", ".join(f"{way} {times[-1]:.2f} s" for way, times in seconds.items()))
    name = f"width {width}"
    rows = [row(f"{name}: {way}", [SPEC.batch_size / s for s in times], "images/s") for way, times in seconds.items()]
    for previous, way in itertools.pairwise(seconds):
        rows.append(row(f"{name}: {way} / {previous}", ratios(seconds[previous], seconds[way]), "ratio"))
    rows.append(row(f"{name}: {ISOCOST} / {SCRIPT}", ratios(seconds[SCRIPT], seconds[ISOCOST]), "ratio"))
    cached_ratios = ratios(seconds[CACHED_EMBEDS], seconds[ISOCOST])
    rows.append(row(f"{name}: {ISOCOST} / {SCRIPT} with both caches", cached_ratios, "ratio"))
    gflop = 3 * model_cost(model, TEXT_ENCODER.max_tokens).gflop_per_forward * SPEC.batch_size
    rows.append(row(f"{name}: {ISOCOST}, FLOPs of the network", [gflop / s for s in seconds[ISOCOST]], "GFLOP/s"))
    return rows


def ratios(before: list[float], after: list[float]) -> list[float]:
    """Speed-up in each turn, from the times before and after a change."""
    return [numerator / denominator for numerator, denominator in zip(before, after, strict=True)]


def main() -> None:
    parser = argument_parser(__doc__, quick="one width, three turns, under a minute")
    parser.add_argument("--turns", type=int, default=7, help="steps of every way, after one warm-up step")
    parser.add_argument("--compile", action="store_true", help="measure the compiled trainer too, which takes minutes")
    parser.add_argument("--images", help="tar shards of images with captions; synthetic scenes if absent")
    arguments = parser.parse_args()

    def log(line: str) -> None:
        if not arguments.json:
            print(line, file=sys.stderr, flush=True)

    images = read_images(arguments.images)
    rows = []
    for width in WIDTHS[:1] if arguments.quick else WIDTHS:
        rows += measure(width, 3 if arguments.quick else arguments.turns, images, arguments.compile, log)
    print_results("training", rows, at_least(rows, {f"width {width}: {ISOCOST} / {SCRIPT}": 3.0 for width in WIDTHS}))


if __name__ == "__main__":
    main()
