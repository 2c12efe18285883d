"""A checkpoint's network made ready for sampling: what does not change from step to step is computed once.

- Keys and values of the captions: a network projects the prompt embeddings to keys and values in every cross-attention of every
  evaluation, a transformer after layers of its own for them, and they are always the same. Here a caption's states are its
  keys and values in all layers, laid end to end.
- Published networks that take more of a caption than its states (`models/hub/packed.py`) are left as they are: what the engine
  hands them is the packed caption.
- Memory layout, precision and compilation are fixed before the first call. On a CUDA device a network that is not compiled is
  recorded at its first call and played back from then on (`models/graphs.py`).

Shape letters: B rows, T tokens, D width of the prompt embeddings, K width of all keys and values, A inner width of one
attention, H heads, N places of a map.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from isocost.models.cuda_graph import CudaGraphModule
from isocost.models.dit import take_caption_projection
from isocost.models.factory import guidance_embed_dim
from isocost.models.guidance_embedding import guidance_embedding
from isocost.models.pretrained.wrappers import ConditionedDenoiser
from isocost.sampling.engine import Denoise
from isocost.utils.progress import say

SamplingDTypeName = Literal["fp32", "bf16", "fp16"]
"""What a network can compute in; points are made in the first two."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Denoiser:
    """A U-Net or a transformer whose prompt embeddings are its keys and values.

    Args:
        network: a diffusers UNet2DConditionModel, or a network of isocost; its cross-attentions, what a transformer does with
            captions before them, and its precision are changed in place.
        precision: "bf16" runs all of the network in bfloat16, "fp16" in float16.
        compiled: by torch.compile at the first call, for one shape; kept on disk for later processes.
    """

    def __init__(self, network: nn.Module, dtype: SamplingDTypeName = "fp32", compiled: bool = False) -> None:
        self.dtype = _DTYPES[dtype]
        parameter = next(network.parameters())
        self.device = parameter.device
        if dtype == "bf16" and self.device.type == "cpu" and not _has_bf16_products():
            say("this processor has no bf16 matrix instructions: precision bf16 will be many times slower than fp32")
        network = network if parameter.dtype == self.dtype else network.to(self.dtype)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_packed = isinstance(network, ConditionedDenoiser)
        self.before_attentions = None if is_packed else take_caption_projection(self.network)
        attentions = [one for one in network.modules() if isinstance(one, Attention) and one.is_cross_attention]
        self.attentions = [] if is_packed else attentions
        self.cross_attention_dim = network.packed_width if isinstance(network, ConditionedDenoiser) else 0
        for attention in self.attentions:
            attention.set_processor(_PrecomputedCrossAttentionKV(self.cross_attention_dim))
            self.cross_attention_dim += 2 * attention.inner_dim
        self.guidance_embed_dim = guidance_embed_dim(network)
        self._call = self._callable(compiled, is_packed)

    def _callable(self, compiled: bool, is_packed: bool) -> Any:
        if compiled:
            return _compile(self.network, self.device)
        return CudaGraphModule(self.network) if self.device.type == "cuda" and not is_packed else self.network

    @property
    def embeds_guidance(self) -> bool:
        """True for a guidance-distilled student: w goes into the network, and one pass is enough."""
        return self.guidance_embed_dim is not None

    @torch.inference_mode()
    def project(self, states: Tensor) -> Tensor:
        """Prompt embeddings [B, T, D] to their keys and values in every cross-attention, [B, T, K]; packed captions stay."""
        if isinstance(self.network, ConditionedDenoiser):
            return states.to(self.device, self.dtype)
        # One by one, so that a caption's bits do not depend on its company.
        return torch.cat([self._project_one(one) for one in states.to(self.device, self.dtype).split(1)])

    def _project_one(self, states: Tensor) -> Tensor:
        if self.before_attentions is not None:
            states = self.before_attentions(states)
        return torch.cat([values for one in self.attentions for values in (one.to_k(states), one.to_v(states))], dim=-1)

    def denoise(self) -> Denoise:
        """The network as the engine calls it."""

        def call(x: Tensor, timesteps: Tensor, states: Tensor, guidance: Tensor) -> Tensor:
            x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            if self.guidance_embed_dim is None:
                return self._call(x, timesteps, states).sample
            embedded = guidance_embedding(guidance, self.guidance_embed_dim).to(self.dtype)
            return self._call(x, timesteps, states, timestep_cond=embedded).sample

        return call


class _PrecomputedCrossAttentionKV:
    """diffusers' attention, with keys and values read from `encoder_hidden_states` [B, T, K] at `first`."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """[B, N, A] -> [B, N, A]."""
        inner, num_heads = attn.inner_dim, attn.heads
        states = encoder_hidden_states[..., self.first : self.first + 2 * inner]
        query = attn.to_q(hidden_states).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        key, value = states.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def _compile(network: nn.Module, device: torch.device) -> Any:
    """One shape, compiled once a machine: the cache on disk outlives the process. A lane has one thread on a CPU."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "isocost" / "inductor"))
    options: dict[str, Any] = {"triton.cudagraphs": True} if device.type == "cuda" else {"cpp.threads": 1}
    return torch.compile(network, dynamic=False, options=options)


def _has_bf16_products() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
