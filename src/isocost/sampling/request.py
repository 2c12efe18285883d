"""Requests to the sampling engine: one image each, with its own solver, number of steps, guidance and prompt.

Shape letters: R requests, C H W latent, L D prompt embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

    Raises:
        ConfigError: the guidance is negative or not finite, or the seed is not an int64.
    """

    sample_index: int
    prompt: int
    coefficients: SolverCoefficients
    guidance: float
    tag: object = None
    seed: int = 0
    negative_prompt: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"guidance = {self.guidance}: give a finite number that is not negative")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}: give a 64-bit integer")


@dataclass(frozen=True, eq=False, slots=True)
class SampleResult:
    """A finished image.

    Attributes:
        request: the request, unchanged.
        latent: float32 [C, H, W] on the engine's device, computed in inference mode.
        nfe: network evaluations that the image costs, including guidance's second pass.
        nfe_executed: the evaluations that were run for this request. The others came from the first-step cache.
        finite: false if the latent contains NaN or inf.
        batch_size: slots of the network calls of this image; the smallest number if memory ran out on the way.
    """

    request: SampleRequest
    latent: Tensor
    nfe: int
    nfe_executed: int
    finite: bool
    batch_size: int


def passes_per_evaluation(guidance: float, embeds_guidance: bool = False) -> int:
    """Network passes per evaluation of the solver: 2 with classifier-free guidance, else 1."""
    return 1 if embeds_guidance or guidance in (0, 1) else 2


class ConditioningPass(NamedTuple):
    """One network pass of a request.

    Attributes:
        prompt: index of its prompt; None is the empty prompt.
        unconditional: whether this is the `uncond` pass of guidance.
    """

    prompt: int | None
    unconditional: bool


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of the network passes.

    Attributes:
        prompt_embeds: prompt indices -> prompt embeddings.
        null_prompt_embeds: [L, D], the embeddings of the empty prompt; None for a network without one.
        embeds_guidance: the network takes w as an input (guidance-distilled students), so one pass is enough at any w.
    """

    prompt_embeds: PromptEmbedsFn
    null_prompt_embeds: Tensor | None
    embeds_guidance: bool = False

    def passes(self, request: SampleRequest) -> tuple[ConditioningPass, ...]:
        """The passes of an evaluation: the conditional one, the unconditional one, or both in this order.

        Raises:
            ConfigError: a pass needs the empty prompt, and the network has none.
        """
        conditional = ConditioningPass(request.prompt, unconditional=False)
        unconditional = ConditioningPass(request.negative_prompt, unconditional=True)
        if passes_per_evaluation(request.guidance, self.embeds_guidance) == 2:
            passes: tuple[ConditioningPass, ...] = (conditional, unconditional)
        else:
            passes = (unconditional if request.guidance == 0 and not self.embeds_guidance else conditional,)
        if self.null_prompt_embeds is None and any(item.prompt is None for item in passes):
            raise ConfigError(
                f"guidance = {request.guidance:g}: this network has no embeddings of the empty prompt; "
                "use guidance 1, and give a prompt"
            )
        return passes

    def guidance_weight(self, request: SampleRequest) -> float:
        """w if the update or the network uses it; 1 for a request with one plain pass."""
        is_used = self.embeds_guidance or passes_per_evaluation(request.guidance) == 2
        return request.guidance if is_used else 1.0

    def embeds_for(self, slot_prompts: list[tuple[int, int | None]]) -> Iterator[tuple[list[int], Tensor]]:
        """Group (slot, prompt) pairs and yield (slots, their embeddings [L, D] or [R, L, D])."""
        null_slots = [slot for slot, prompt in slot_prompts if prompt is None]
        prompted = [(slot, prompt) for slot, prompt in slot_prompts if prompt is not None]
        if null_slots:
            assert self.null_prompt_embeds is not None, "passes() rejects such a request"
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
