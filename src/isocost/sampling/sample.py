"""Images of given prompts from one checkpoint.

Shapes: P prompts, K images per prompt, N = P K images, R resolution.
"""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.sweep import DEFAULT_BATCH_SIZE
from isocost.config.types import DTypeName
from isocost.diffusion.guidance import GuidanceSchedule, Interval, check_schedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import Autoencoder, check_vae
from isocost.models.checkpoint import open_checkpoint
from isocost.models.component_costs import checkpoint_components
from isocost.models.components import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from isocost.models.text_encoder import TextEncoder
from isocost.sampling.denoiser import Denoiser, torch_dtype
from isocost.sampling.engine import GuideNetwork
from isocost.sampling.generate import (
    GeneratedBatch,
    PromptEmbeds,
    decode_results,
    generate,
    make_engine,
    schedule_of,
)
from isocost.sampling.guides import check_pair, make_guide, weights_of_evaluations
from isocost.sampling.request import SampleRequest, SampleResult, passes_in_total, passes_per_evaluation
from isocost.utils.device import best_device, check_device

GUIDE = "guide"
"""Name of the guide in the engine."""
DTYPE_NAMES: dict[torch.dtype | str, DTypeName] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    "fp32": "fp32",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class Samples:
    """Generated images and their cost. In a notebook they show themselves.

    Attributes:
        array: uint8 [P, K, R, R, 3].
        prompts: P prompts.
        nfe: network evaluations per image, including those of a guide.
        gflop: cost of an image: its prompt, these evaluations and the decoder.
        seconds: wall-clock time of sampling and decoding; with `offload`, of loading the denoiser and the autoencoder too.
        solver: label of the solver.
        replaced_scheduler: scheduler class of a published checkpoint, if the request `nearest` replaced it; else empty.
    """

    array: np.ndarray
    prompts: tuple[str, ...]
    nfe: int
    gflop: float
    seconds: float
    solver: str
    replaced_scheduler: str = ""

    @property
    def images(self) -> list[Image.Image]:
        """P K images, prompt by prompt."""
        return [Image.fromarray(image) for images in self.array for image in images]

    def grid(self) -> Image.Image:
        """All images in one, with a row per prompt."""
        num_prompts, num_images, size, _, _ = self.array.shape
        tiled = self.array.transpose(0, 2, 1, 3, 4).reshape(num_prompts * size, num_images * size, 3)
        return Image.fromarray(tiled)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


class Model:
    """A text-to-image checkpoint, loaded once for any number of calls.

    Attributes:
        info: size, resolution, costs and defaults of the checkpoint.
        device: where it runs.
        dtype: of the denoiser.
        vae: dtype, tiling and slicing of the autoencoder.
        offload: whether every part is loaded for its stage and released after it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "fp32",
        compiled: bool = False,
        vae_dtype: torch.dtype | str = "fp32",
        vae_tile_size: int | None = None,
        vae_slicing: bool = False,
        offload: bool = False,
    ) -> None:
        """
        Args:
            checkpoint: a checkpoint folder or a published pipeline.
            device: by default CUDA if there is any, else the CPU.
            dtype: of the denoiser: "fp32" or "bf16", or the torch dtype.
            compiled: compile the denoiser, which takes minutes once per machine.
            vae_dtype: of the autoencoder, as `dtype`.
            vae_tile_size: decode in overlapping tiles of this many pixels, a multiple of 64.
            vae_slicing: decode one image at a time.
            offload: in every call of `sample`, load the text encoder, then the denoiser, then the autoencoder, and release each
                one before the next is loaded. The images are the same bit for bit.

        Raises:
            ConfigError: the checkpoint cannot be read, is for super-resolution, or does not support a setting.
        """
        for name, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if value not in DTYPE_NAMES:
                raise ConfigError(f"{name} = {value}: give fp32 or bf16")
        if offload and compiled:
            raise ConfigError("offload reads the network again in every call and would compile it again; leave out one of both")
        self.checkpoint, self.offload, self._compiled = checkpoint, offload, compiled
        self.device = best_device() if device is None else check_device(device)
        self.dtype = DTYPE_NAMES[dtype]
        vae_fields = {"dtype": DTYPE_NAMES[vae_dtype], "tile_size": vae_tile_size, "slicing": vae_slicing}
        self.vae = parse_spec(VaeSpec, vae_fields, "vae")
        self._source = open_checkpoint(checkpoint)
        self.info = self._source.info
        if self.info.scale is not None:
            raise ConfigError(f"{checkpoint}: this is a super-resolution model; use `isocost upscale CHECKPOINT IMAGE OUT`")
        self.vae.check_resolution(self.info.resolution, "vae_tile_size (--vae-tile-size)")
        if self.info.pretrained is None:
            check_vae(self._source.autoencoder_path, self.info.autoencoder_subfolder, self.vae)
        self._denoiser = None if offload else self._load_denoiser()

    def _load_denoiser(self) -> Denoiser:
        network = self._source.load_network(self.device, torch_dtype(self.dtype))
        return Denoiser(network, self.dtype, self._compiled)

    @property
    def denoiser(self) -> Denoiser:
        """The network, ready to be called.

        Raises:
            ConfigError: it is loaded in every call (`offload`).
        """
        if self._denoiser is None:
            raise ConfigError(f"{self.checkpoint}: the network is offloaded; load the model without offload")
        return self._denoiser

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The embeddings of prompts and of the empty prompt."""
        return self._encode(prompts)

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        return load_checkpoint_autoencoder(self._source, self.device, self.vae)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return load_checkpoint_text_encoder(self._source, self.device)

    def _offload(self, *names: str) -> None:
        """Release loaded parts, and the memory of everything else that is not referenced any more."""
        for name in names:
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, texts: Sequence[str]) -> PromptEmbeds:
        prompt_embeds = PromptEmbeds.encode(texts, self._text_encoder)
        if self.offload:
            self._offload("_text_encoder")
        return prompt_embeds

    def _generate(
        self,
        requests: Sequence[SampleRequest],
        prompt_embeds: PromptEmbeds,
        guide: GuideNetwork | None,
        batch_size: int | None,
    ) -> Iterator[GeneratedBatch]:
        if batch_size is None:
            passes = 1 if guide is not None else passes_per_evaluation(requests[0].guidance, self.info.model.embeds_guidance)
            batch_size = min(DEFAULT_BATCH_SIZE, len(requests) * passes)
        if self._denoiser is not None:
            engine = make_engine(self._denoiser, self.info, prompt_embeds, batch_size=batch_size)
            if guide is not None:
                engine.add_guide(GUIDE, guide)
            yield from generate(engine, self._autoencoder, requests)
            return
        results = self._denoise(requests, prompt_embeds, batch_size)
        self._offload()
        try:
            yield from decode_results(results, self.info.model.latent_size, self._autoencoder)
        finally:
            self._offload("_autoencoder")

    def _denoise(self, requests: Sequence[SampleRequest], prompt_embeds: PromptEmbeds, batch_size: int) -> list[SampleResult]:
        """All latents, from a denoiser that is loaded here and referenced nowhere else."""
        return list(make_engine(self._load_denoiser(), self.info, prompt_embeds, batch_size=batch_size).run(requests))

    def __repr__(self) -> str:
        info = self.info
        return f"Model({info.label}, {info.resolution} x {info.resolution} pixels, {self.dtype}, {self.device})"

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        solver: str | SolverSpec | None = None,
        num_steps: int | None = None,
        guidance: float = 2.0,
        num_images: int = 1,
        seed: int = 0,
        negative_prompt: str | None = None,
        guide: Model | str | Path | None = None,
        guide_null_prompt: bool = False,
        guidance_interval: Interval | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
    ) -> Samples:
        """Generate `num_images` images of each prompt. Image k of prompt p has the sample index `first_index` + p K + k.

        Args:
            prompts: P prompts, or one.
            solver: a name of `isocost.list_solvers()` or its full specification; by default the checkpoint's own: DDIM, or LCM
                for a consistency student.
            num_steps: by default 16, and 4 for a few-step student.
            guidance: w in `uncond + w (cond - uncond)`; 1 is no guidance. For a published checkpoint 0 means 1.
            num_images: K, images per prompt.
            seed: of the noise.
            negative_prompt: replaces the empty prompt in guidance's unconditional pass.
            guide: a smaller or less trained model of the same latent space and noise schedule, for
                `guide + w (model - guide)` with the same prompt (autoguidance, arXiv 2406.02507): a `Model`, or a checkpoint to
                load. By default the model guides itself with the empty prompt.
            guide_null_prompt: the guide gets the empty prompt.
            guidance_interval: (low, high) in log-SNR, `log(alpha^2 / sigma^2)`: guidance where low <= log-SNR < high
                (arXiv 2404.07724), elsewhere one pass with w = 1. None is an open end.
            guidance_schedule: w by log-SNR in place of `guidance`: points (log-SNR, w), linear between them.
            first_index: sample index of the first image.
            batch_size: slots of a network call; by default as many as the images fill, at most 64.

        Raises:
            ConfigError: the checkpoint or the solver does not support the settings, or an image contains NaN or inf.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        info = self.info
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ConfigError("give at least one prompt that is not empty (--prompt TEXT)")
        if num_images < 1:
            raise ConfigError(f"num_images = {num_images}: give at least 1")
        if guidance_schedule is not None:
            guidance = max(weight for _, weight in check_schedule(guidance_schedule))
        if negative_prompt is not None and guidance in (0, 1):
            raise ConfigError("a negative prompt has no effect at guidance 0 or 1; give a guidance above 1, or leave it out")
        guidance = info.effective_guidance(guidance)
        if negative_prompt is not None and info.model.embeds_guidance:
            raise ConfigError(
                f"{self.checkpoint}: a guidance-distilled student has no unconditional pass; leave the negative prompt out"
            )
        requested = SolverSpec(name=solver) if isinstance(solver, str) else solver
        spec = info.resolve_solver(requested)
        noise = schedule_of(info)
        coefficients = solver_coefficients(spec, spec.steps_or(num_steps, info.num_steps), noise)
        weights = weights_of_evaluations(coefficients, noise, guidance, guidance_interval, guidance_schedule)
        guide_model = self._load_guide(guide)
        encodes_prompt = guide_model is not None and not guide_null_prompt
        components = checkpoint_components(
            self._source, guide_model._source if guide_model and encodes_prompt else None, self.vae
        )
        negative_index = None if negative_prompt is None else len(prompts)
        requests = [
            SampleRequest(
                first_index + i,
                i // num_images,
                coefficients,
                guidance,
                seed=seed,
                negative_prompt=negative_index,
                guidance_per_evaluation=weights,
                guide=None if guide_model is None else GUIDE,
                guide_is_unconditional=guide_null_prompt,
            )
            for i in range(len(prompts) * num_images)
        ]
        texts = list(prompts) if negative_prompt is None else [*prompts, negative_prompt]
        prompt_embeds = self._encode(texts)
        guide_network = None
        if guide_model is not None:
            guide_embeds = PromptEmbeds.encode(texts, guide_model._text_encoder)
            assert guide_model._denoiser is not None, "_load_guide() refuses offloading"
            guide_network = make_guide(guide_model._denoiser, guide_model.info, guide_embeds)
        started = time.perf_counter()
        size = info.resolution
        images = torch.empty(len(requests), 3, size, size, dtype=torch.uint8)
        for batch in self._generate(requests, prompt_embeds, guide_network, batch_size):
            if batch.nonfinite:
                index = batch.nonfinite[0].request.sample_index
                raise ConfigError(f"image {index} contains NaN or inf; lower the guidance or train longer")
            images[[result.request.sample_index - first_index for result in batch.results]] = batch.images
        seconds = time.perf_counter() - started
        by_prompt = images.permute(0, 2, 3, 1).numpy().reshape(len(prompts), num_images, size, size, 3)
        own, of_guide = passes_in_total(weights, info.model.embeds_guidance, guide_model is not None)
        gflop = own * info.gflop_per_forward
        gflop += 0.0 if guide_model is None else of_guide * guide_model.info.gflop_per_forward
        gflop += components.total
        replaced = info.replaced_scheduler(requested)
        return Samples(by_prompt, tuple(prompts), own + of_guide, gflop, seconds, spec.label, replaced)

    def _load_guide(self, guide: Model | str | Path | None) -> Model | None:
        """Load a guide and check that it fits.

        Raises:
            ConfigError: it does not load, is this model itself, or has another latent space or noise schedule.
        """
        if guide is None:
            return None
        if self.offload or (isinstance(guide, Model) and guide.offload):
            raise ConfigError("a guide and the network run at the same time, so neither can be offloaded; leave offload out")
        model = guide if isinstance(guide, Model) else Model(guide, device=self.device, dtype=self.dtype)
        check_pair(
            self._source,
            model._source,
            str(model.checkpoint),
            lambda source: (self if source is self._source else model)._autoencoder,
        )
        return model


def sample(
    checkpoint: str | Path,
    prompts: str | Sequence[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "fp32",
    compiled: bool = False,
    vae_dtype: torch.dtype | str = "fp32",
    vae_tile_size: int | None = None,
    vae_slicing: bool = False,
    offload: bool = False,
    **settings: Any,
) -> Samples:
    """Load a checkpoint and generate images: `Model(checkpoint, ...).sample(prompts, **settings)`.

    Raises:
        ConfigError: the checkpoint does not load, the checkpoint or the solver does not support the settings, or an image
            contains NaN or inf.
    """
    model = Model(
        checkpoint,
        device=device,
        dtype=dtype,
        compiled=compiled,
        vae_dtype=vae_dtype,
        vae_tile_size=vae_tile_size,
        vae_slicing=vae_slicing,
        offload=offload,
    )
    return model.sample(prompts, **settings)
