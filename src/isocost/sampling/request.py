"""Requests to the sampling engine: one image each, with its own solver, number of steps, guidance and prompt.

Shape letters: R requests, C H W latent, L D prompt embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isocost.diffusion.solvers import SolverCoefficients
from isocost.errors import ConfigError

PromptEmbedsFn = Callable[[Tensor], Tensor]
"""Prompt indices int64 [R] on the CPU -> prompt embeddings [R, L, D] on any device."""

PerSampleFn = Callable[[Tensor], Tensor]
"""Sample indices int64 [R] on the CPU -> latents [R, ...] on any device."""


Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [P, C + C', H, W] float32, timesteps [P] float32, prompt_embeds [P, L, D], guidance [P] float32) -> output [P, C, H, W].

The output is the network's raw output. `guidance` is for networks that embed it; others ignore it."""


@dataclass(frozen=True, eq=False, slots=True)
class SampleRequest:
    """One image to generate.

    Attributes:
        sample_index: together with `seed` it determines all noise of the image.
        prompt: index into the engine's prompt embeddings.
        coefficients: of the solver. Requests share the object (`solver_coefficients` returns the same object for the same
            arguments).
        guidance: w in `uncond + w (cond - uncond)`. With w = 1 only the conditional pass runs, with w = 0 only the
            unconditional pass. A network that embeds its guidance needs one pass at any w.
        tag: any object of the caller, for example the point of the request. The engine returns it unchanged.
        seed: int64.
        negative_prompt: index of the prompt of the unconditional pass; None is the empty prompt.
        guidance_per_evaluation: w at each evaluation of the solver (`diffusion/guidance.py`); None is `guidance` at each.
        guide: name of the engine's guide network that runs the second pass, with this prompt: `guide + w (cond - guide)`
            (autoguidance, arXiv 2406.02507). None is the network itself with the unconditional prompt.
        guide_is_unconditional: the guide gets the unconditional prompt.

    Raises:
        ConfigError: a guidance is negative or not finite, or below 1 with a guide; the seed is not an int64; the number of
            values does not match the evaluations; or a negative prompt is given that no pass uses.
    """

    sample_index: int
    prompt: int
    coefficients: SolverCoefficients
    guidance: float
    tag: object = None
    seed: int = 0
    negative_prompt: int | None = None
    guidance_per_evaluation: tuple[float, ...] | None = None
    guide: str | None = None
    guide_is_unconditional: bool = False

    def __post_init__(self) -> None:
        num_evaluations = self.coefficients.num_function_evaluations
        if self.guidance_per_evaluation is not None and len(self.guidance_per_evaluation) != num_evaluations:
            raise ConfigError(
                f"{len(self.guidance_per_evaluation)} guidance values for {num_evaluations} evaluations; give one each"
            )
        for guidance in (self.guidance, *(self.guidance_per_evaluation or ())):
            if not 0 <= guidance < math.inf:
                raise ConfigError(f"guidance = {guidance}: give a finite number that is not negative")
            if self.guide is not None and guidance < 1:
                raise ConfigError(f"guidance = {guidance:g} with a guide would lead to the images of the guide; give 1 or more")
        if self.guide is not None and self.negative_prompt is not None and not self.guide_is_unconditional:
            raise ConfigError("a negative prompt needs an unconditional pass; leave it out, or give the guide the empty prompt")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}: give a 64-bit integer")

    @property
    def weights(self) -> tuple[float, ...]:
        """w at each evaluation."""
        if self.guidance_per_evaluation is not None:
            return self.guidance_per_evaluation
        return (self.guidance,) * self.coefficients.num_function_evaluations

    @property
    def conditional_pass(self) -> ConditioningPass:
        """The pass of the network with the prompt."""
        return ConditioningPass(self.prompt, unconditional=False)

    @property
    def second_pass(self) -> ConditioningPass:
        """The pass that guidance leads away from: of the network itself with the unconditional prompt, or of the guide."""
        if self.guide is not None and not self.guide_is_unconditional:
            return ConditioningPass(self.prompt, unconditional=False, guide=self.guide)
        return ConditioningPass(self.negative_prompt, unconditional=True, guide=self.guide)


@dataclass(frozen=True, eq=False, slots=True)
class SampleResult:
    """A finished image.

    Attributes:
        request: the request, unchanged.
        latent: float32 [C, H, W] on the engine's device, computed in inference mode.
        nfe: network evaluations that the image costs, including guidance's second pass and those of a guide.
        nfe_executed: the evaluations that were run for this request. The others came from the first-step cache.
        finite: false if the latent contains NaN or inf.
        batch_size: slots of the network calls of this image; the smallest number if memory ran out on the way.
        guide_nfe: the evaluations among `nfe` that the guide runs.
    """

    request: SampleRequest
    latent: Tensor
    nfe: int
    nfe_executed: int
    finite: bool
    batch_size: int
    guide_nfe: int = 0


def passes_per_evaluation(guidance: float, embeds_guidance: bool = False) -> int:
    """Network passes per evaluation of the solver: 2 with classifier-free guidance, else 1."""
    return 1 if embeds_guidance or guidance in (0, 1) else 2


def passes_in_total(weights: Sequence[float], embeds_guidance: bool = False, has_guide: bool = False) -> tuple[int, int]:
    """Network passes of an image by the main network and by the guide.

    Args:
        weights: w at each evaluation of the solver.
        embeds_guidance: the network takes w as an input.
        has_guide: a guide network runs the second passes.
    """
    total = sum(passes_per_evaluation(weight, embeds_guidance) for weight in weights)
    return (len(weights), total - len(weights)) if has_guide else (total, 0)


class ConditioningPass(NamedTuple):
    """One network pass of a request.

    Attributes:
        prompt: index of its prompt; None is the empty prompt.
        unconditional: whether it has the unconditional prompt, the empty or the negative one.
        guide: name of the guide that runs it; None is the main network.
    """

    prompt: int | None
    unconditional: bool
    guide: str | None = None


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of the passes of one network.

    Attributes:
        prompt_embeds: prompt indices -> prompt embeddings.
        null_prompt_embeds: [L, D], the embeddings of the empty prompt; None for a network without one.
        embeds_guidance: the network takes w as an input (guidance-distilled students), so one pass is enough at any w.
    """

    prompt_embeds: PromptEmbedsFn
    null_prompt_embeds: Tensor | None
    embeds_guidance: bool = False

    def passes(self, request: SampleRequest, weight: float) -> tuple[ConditioningPass, ...]:
        """The passes of an evaluation at w: the conditional one, the second one, or both in this order."""
        if self.embeds_guidance or weight == 1:
            return (request.conditional_pass,)
        return (request.second_pass,) if weight == 0 else (request.conditional_pass, request.second_pass)

    def embeds_for(self, slot_prompts: Sequence[tuple[int, int | None]]) -> Iterator[tuple[list[int], Tensor]]:
        """Group (slot, prompt) pairs and yield (slots, their embeddings [L, D] or [R, L, D])."""
        null_slots = [slot for slot, prompt in slot_prompts if prompt is None]
        prompted = [(slot, prompt) for slot, prompt in slot_prompts if prompt is not None]
        if null_slots:
            assert self.null_prompt_embeds is not None, "check_request() rejects such a request"
            yield null_slots, self.null_prompt_embeds
        if prompted:
            slots, prompts = zip(*prompted, strict=True)
            yield list(slots), self.prompt_embeds(torch.tensor(prompts))

    @property
    def example_embeds(self) -> Tensor:
        """[L, D], for the shape and dtype of all embeddings."""
        return (
            self.prompt_embeds(torch.zeros(1, dtype=torch.int64))[0]
            if self.null_prompt_embeds is None
            else self.null_prompt_embeds
        )


def check_request(request: SampleRequest, main: Conditioning, guides: Mapping[str, Conditioning]) -> None:
    """Check that the networks can run all passes of a request.

    Raises:
        ConfigError: the guide is unknown, the main network embeds its guidance, or a pass needs the empty prompt, and its
            network has none.
    """
    if request.guide is not None and request.guide not in guides:
        raise ConfigError(f"guide {request.guide!r}: unknown; the engine has {', '.join(map(repr, guides)) or 'no guides'}")
    if request.guide is not None and main.embeds_guidance:
        raise ConfigError(
            "this network was trained with its guidance as an input, so no guide can lead it; leave the guide out"
        )
    passes = {item for weight in set(request.weights) for item in main.passes(request, weight)}
    for item in passes:
        network = main if item.guide is None else guides[item.guide]
        if item.prompt is None and network.null_prompt_embeds is None:
            raise ConfigError(
                f"guidance = {request.guidance:g}: this network has no embeddings of the empty prompt; "
                "use guidance 1, and give a prompt"
            )
