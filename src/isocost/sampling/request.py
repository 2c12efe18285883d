"""A row is one image to make, with its own solver, number of steps, guidance and caption.

Shape letters: R rows, C H W latent, L D states.
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

PromptEmbeds = Callable[[Tensor], Tensor]
"""Caption indices int64 [R] on the CPU -> states [R, L, D] on any device."""

PerSampleFn = Callable[[Tensor], Tensor]
"""Image ids int64 [R] on the CPU -> latents [R, ...] on any device."""


@dataclass(frozen=True, eq=False, slots=True)
class SampleRequest:
    """One image to make.

    Attributes:
        sample_index: with `seed`, what all of the image's noise is a function of.
        caption: index into the engine's prompt embeddings.
        table: shared between rows (`solver_coefficients` gives the same object for the same arguments).
        guidance: w in `uncond + w (cond - uncond)`; 1 takes the conditional pass alone, 0 the unconditional pass alone. A
            network that embeds its guidance takes one pass at any w.
        tag: the caller's own (which point the row belongs to); handed back untouched.
        seed: int64.
        negative: index of the caption that stands in for the empty one in the unconditional pass; None is the empty one.
    """

    sample_index: int
    prompt: int
    table: SolverCoefficients
    guidance: float
    tag: object = None
    seed: int = 0
    negative_prompt: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"guidance = {self.guidance}: give a finite number that is not negative")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}: give an integer of 64 bits")


@dataclass(frozen=True, eq=False, slots=True)
class SampleResult:
    """A finished image.

    Attributes:
        row: as it was given.
        latent: float32 [C, H, W] on the engine's device, made in inference mode.
        nfe: network evaluations that the image costs, guidance's second pass counted.
        nfe_executed: how many of them were computed for it, and not shared with an earlier row.
        finite: false where the latent holds an infinity or a NaN.
        batch_size: places of the network calls that made it, the fewest where memory ran out on the way.
    """

    row: SampleRequest
    latent: Tensor
    nfe: int
    nfe_executed: int
    finite: bool
    batch_size: int


def num_passes(guidance: float, embeds_guidance: bool = False) -> int:
    """Network passes an evaluation."""
    return 1 if embeds_guidance or guidance in (0, 1) else 2


class Pass(NamedTuple):
    """A network pass of a row: its caption, None for the empty one, and whether it is what guidance leads away from."""

    prompt: int | None
    unconditional: bool


@dataclass(frozen=True)
class Conditioning:
    """What the passes of a row are conditioned on.

    Attributes:
        prompt_embeds: looks captions up.
        null_prompt_embeds: [L, D], the states of the empty caption; None for a network without one.
        embeds_guidance: the network takes w itself (guidance-distilled students): one pass at any w.
    """

    prompt_embeds: PromptEmbeds
    null_prompt_embeds: Tensor | None
    embeds_guidance: bool = False

    def passes(self, row: SampleRequest) -> tuple[Pass, ...]:
        """The passes of an evaluation: the conditional one, the unconditional one, or both in this order.

        Raises:
            ConfigError: the empty caption is asked for, and there is none.
        """
        conditional, unconditional = Pass(row.prompt, False), Pass(row.negative_prompt, True)
        if num_passes(row.guidance, self.embeds_guidance) == 2:
            passes: tuple[Pass, ...] = (conditional, unconditional)
        else:
            passes = (unconditional if row.guidance == 0 and not self.embeds_guidance else conditional,)
        if self.null_prompt_embeds is None and any(one.prompt is None for one in passes):
            raise ConfigError(f"guidance = {row.guidance:g}: this network has no null caption; take guidance 1")
        return passes

    def weight(self, row: SampleRequest) -> float:
        """w where it is used, by the update or by the network; 1 where a row takes one plain pass."""
        return row.guidance if num_passes(row.guidance, self.embeds_guidance) == 2 or self.embeds_guidance else 1.0

    def states(self, wanted: list[tuple[int, int | None]]) -> Iterator[tuple[list[int], Tensor]]:
        """(place, caption) pairs to places with their states [L, D] or [R, L, D]."""
        empty = [place for place, prompt in wanted if prompt is None]
        given = [(place, prompt) for place, prompt in wanted if prompt is not None]
        if empty:
            assert self.null_prompt_embeds is not None, "captions() refuses it"
            yield empty, self.null_prompt_embeds
        if given:
            places, prompts = zip(*given, strict=True)
            yield list(places), self.prompt_embeds(torch.tensor(prompts))

    @property
    def example_embeds(self) -> Tensor:
        """[L, D], for a place that stands empty."""
        return (
            self.prompt_embeds(torch.zeros(1, dtype=torch.int64))[0]
            if self.null_prompt_embeds is None
            else self.null_prompt_embeds
        )
