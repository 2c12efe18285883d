"""Parameters and GFLOP of a network, counted on the meta device, which needs no memory and no weights.

GFLOP are 2 x multiply-accumulates of matrix products, convolutions and attention, for one sample and one forward pass. The
meta device is required: on a CPU, torch counts fused attention as zero, which distorts the ratios between sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from isocost.config.model import ModelSpec
from isocost.models.dit import depth_of, head_dim
from isocost.models.factory import Network, build_network
from isocost.models.paper_table import BY_WIDTH, PAPER_NUM_TOKENS, PAPER_SHAPE, REFERENCE_WIDTH
from isocost.models.unet import build_unchecked_unet, size_name


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of one network at one latent shape.

    `normalized_cost_per_step` is `gflop_per_forward` divided by that of the c = 320 U-Net (866M at a cross-attention width of
    1024) at the same latent shape, number of tokens and cross-attention width. The paper's "norm. cost" is the same ratio at
    64x64x4. Costs of transformers are divided by the cost of this U-Net too, so that both families share an axis.
    """

    size: str
    width: int
    num_parameters: int
    gflop_per_forward: float
    normalized_cost_per_step: float


def model_cost(spec: ModelSpec, num_tokens: int = PAPER_NUM_TOKENS) -> ModelCost:
    """Count the cost of a network and of the reference network.

    Raises:
        ConfigError: the width or the latent size does not fit the family.
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
    is_paper_depth = spec.kind == "unet" and (spec.layers_per_block, spec.num_levels) == (2, 4)
    name = size_name(spec.width, num_parameters, spec.cross_attention_dim if is_paper_depth else 0)
    if spec.kind == "dit":
        name = f"DiT-{num_parameters / 1e3:.0f}K" if num_parameters < 1e6 else f"DiT-{name}"
    return ModelCost(name, spec.width, num_parameters, gflop, gflop / reference)


def reference_gflop() -> float:
    """GFLOP of one forward pass of the 866M network of arXiv 2404.01367 at its latent shape (64 x 64 x 4, 77 tokens).

    This is the unit of normalized cost for published checkpoints, which differ in latent shape and text encoder.
    """
    return _count_reference_gflop(ModelSpec(width=REFERENCE_WIDTH), PAPER_NUM_TOKENS)


@lru_cache(maxsize=256)
def _count(spec: ModelSpec, num_tokens: int) -> tuple[int, float]:
    network = build_network(spec, device="meta").eval()
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return num_parameters, _gflop(network, spec, num_tokens)


@lru_cache(maxsize=64)
def _count_reference_gflop(spec: ModelSpec, num_tokens: int) -> float:
    return _gflop(build_unchecked_unet(spec, "meta").eval(), spec, num_tokens)


def _gflop(network: Network, spec: ModelSpec, num_tokens: int) -> float:
    latents = torch.empty(
        1, spec.latent_channels + spec.extra_input_channels, spec.latent_size, spec.latent_size, device="meta"
    )
    prompt_embeds = torch.empty(1, num_tokens, spec.cross_attention_dim, device="meta")
    options = {}
    if spec.guidance_embed_dim is not None:
        options["timestep_cond"] = torch.empty(1, spec.guidance_embed_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(latents, torch.zeros(1, device="meta"), prompt_embeds, **options)
    return counter.get_total_flops() / 1e9


def family_table(widths: list[int], spec: ModelSpec, num_tokens: int = PAPER_NUM_TOKENS) -> list[dict[str, object]]:
    """Sizes and costs of a family, one row per width.

    Rows of U-Nets also have the paper's figures if latent shape, cross-attention width and number of tokens are the paper's.
    Rows of transformers have depth and heads instead.
    """
    is_paper_shape = (spec.latent_channels, spec.latent_size, spec.cross_attention_dim, num_tokens) == PAPER_SHAPE
    rows: list[dict[str, object]] = []
    for width in widths:
        cost = model_cost(spec.model_copy(update={"width": width}), num_tokens)
        counted = {
            "parameters_million": round(cost.num_parameters / 1e6, 3 if cost.num_parameters < 1e7 else 1),
            "gflop_per_forward": round(cost.gflop_per_forward, 4 if cost.gflop_per_forward < 10 else 1),
            "normalized_cost_per_step": round(cost.normalized_cost_per_step, 5 if cost.normalized_cost_per_step < 0.01 else 3),
        }
        identity = {"size": cost.size, "width": width}
        if spec.kind == "dit":
            rows.append({**identity, "depth": depth_of(width), "heads": width // head_dim(width), **counted})
            continue
        paper = BY_WIDTH.get(width) if is_paper_shape else None
        rows.append(
            {
                **identity,
                **counted,
                "reference_gflop": paper.gflop if paper else None,
                "paper_normalized_cost_per_step": paper.normalized_cost_per_step if paper else None,
                "paper_note": paper.note if paper else "",
            }
        )
    return rows
