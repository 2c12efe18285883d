"""Parameters and GFLOP of a network, counted on the meta device: no memory, no weights, any size.

GFLOP are 2 x multiply-accumulates of matrix products, convolutions and attention, for one row and one pass. Counting on
meta matters: on CPU, fused attention is counted as zero, which bends the ratios between sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from isocost.config.model import ModelSpec
from isocost.models.dit import depth_of, head_width
from isocost.models.factory import Network, build_network
from isocost.models.paper_table import BY_WIDTH, PAPER_NUM_TOKENS, PAPER_SHAPE, REFERENCE_WIDTH
from isocost.models.unet import size_name, unet_of


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of one network at one latent shape.

    `normalized_cost_per_step` is `gflop_per_forward` over that of the family's c = 320 network (866M at context width 1024) at the
    same latent shape, token number and context width, as the paper's "norm. cost" is at 64x64x4. Transformers are measured by
    the paper's U-Net as well, so that both families share an axis.
    """

    size: str
    width: int
    num_parameters: int
    gflop_per_forward: float
    normalized_cost_per_step: float


def model_cost(spec: ModelSpec, num_tokens: int = PAPER_NUM_TOKENS) -> ModelCost:
    """Count one network and its reference.

    Raises:
        ConfigError: the width or latent side does not fit the family.
    """
    num_parameters, gflop = _count(spec, num_tokens)
    reference = _count_reference_gflop(
        ModelSpec(
            width=REFERENCE_WIDTH,
            latent_channels=spec.latent_channels,
            latent_size=spec.latent_size,
            cross_attention_dim=spec.cross_attention_dim,
            layers_per_block=spec.layers_per_block,
            num_levels=spec.num_levels,
        ),
        num_tokens,
    )
    is_papers = spec.kind == "unet" and (spec.layers_per_block, spec.num_levels) == (2, 4)
    name = size_name(spec.width, num_parameters, spec.cross_attention_dim if is_papers else 0)
    if spec.kind == "dit":
        name = f"DiT-{num_parameters / 1e3:.0f}K" if num_parameters < 1e6 else f"DiT-{name}"
    return ModelCost(name, spec.width, num_parameters, gflop, gflop / reference)


def reference_gflop() -> float:
    """GFLOP of one forward of the paper's 866M network at its own shape (64 x 64 x 4, 77 tokens of width 1024).

    The unit of checkpoints that are given: they differ in latents and captions, and are measured by one network.
    """
    return _count_reference_gflop(ModelSpec(width=REFERENCE_WIDTH), PAPER_NUM_TOKENS)


@lru_cache(maxsize=256)
def _count(spec: ModelSpec, num_tokens: int) -> tuple[int, float]:
    network = build_network(spec, device="meta").eval()
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return num_parameters, _gflop(network, spec, num_tokens)


@lru_cache(maxsize=64)
def _count_reference_gflop(spec: ModelSpec, num_tokens: int) -> float:
    return _gflop(unet_of(spec, "meta").eval(), spec, num_tokens)


def _gflop(network: Network, spec: ModelSpec, num_tokens: int) -> float:
    rows = torch.empty(1, spec.latent_channels + spec.extra_input_channels, spec.latent_size, spec.latent_size, device="meta")
    states = torch.empty(1, num_tokens, spec.cross_attention_dim, device="meta")
    embedded = (
        {} if spec.guidance_embed_dim is None else {"timestep_cond": torch.empty(1, spec.guidance_embed_dim, device="meta")}
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(rows, torch.zeros(1, device="meta"), states, **embedded)
    return counter.get_total_flops() / 1e9


def family_table(widths: list[int], spec: ModelSpec, num_tokens: int = PAPER_NUM_TOKENS) -> list[dict[str, object]]:
    """One row a width: ours counted, the paper's beside it where width, latent shape, context and tokens are the paper's.

    Transformers have their depth and heads in place of the paper's figures.
    """
    as_in_paper = (spec.latent_channels, spec.latent_size, spec.cross_attention_dim, num_tokens) == PAPER_SHAPE
    rows: list[dict[str, object]] = []
    for width in widths:
        cost = model_cost(spec.model_copy(update={"width": width}), num_tokens)
        counted = {
            "parameters_million": round(cost.num_parameters / 1e6, 3 if cost.num_parameters < 1e7 else 1),
            "gflop_per_forward": round(cost.gflop_per_forward, 4 if cost.gflop_per_forward < 10 else 1),
            "normalized_cost_per_step": round(cost.normalized_cost_per_step, 5 if cost.normalized_cost_per_step < 0.01 else 3),
        }
        named = {"size": cost.size, "width": width}
        if spec.kind == "dit":
            rows.append({**named, "depth": depth_of(width), "heads": width // head_width(width), **counted})
            continue
        paper = BY_WIDTH.get(width) if as_in_paper else None
        rows.append(
            {
                **named,
                **counted,
                "reference_gflop": paper.gflop if paper else None,
                "paper_normalized_cost_per_step": paper.normalized_cost_per_step if paper else None,
                "paper_note": paper.note if paper else "",
            }
        )
    return rows
