"""A checkpoint's network prepared for sampling: values that stay the same over all steps are computed once.

- Keys and values of the prompts. A network projects the prompt embeddings to keys and values in every cross-attention of every
  evaluation (a transformer first runs its own layers on them), always with the same result. Here the prompt embeddings are
  replaced by the keys and values of all layers, concatenated.
- Published networks whose conditioning is more than prompt embeddings (`models/pretrained/wrappers.py`) are not changed. The
  engine passes them their packed conditioning.
- Memory layout, dtype and compilation are fixed before the first call. On a CUDA device a network that is not compiled is
  recorded as a CUDA graph at its first call (`models/cuda_graph.py`).

Shape letters: B rows, T tokens, D width of the prompt embeddings, K width of all keys and values, A inner width of one
attention, H heads, N positions of a feature map.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from isocost.models.cuda_graph import CudaGraphModule
from isocost.models.dit import pop_caption_projection
from isocost.models.factory import guidance_embed_dim
from isocost.models.guidance_embedding import guidance_embedding
from isocost.models.pretrained.wrappers import ConditionedDenoiser
from isocost.sampling.request import Denoise

logger = logging.getLogger(__name__)

SamplingDTypeName = Literal["fp32", "bf16", "fp16"]
"""The dtypes that a network can compute in. The points of a study use the first two."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: SamplingDTypeName) -> torch.dtype:
    """The torch dtype of a name in a study or an option: torch.bfloat16 for "bf16"."""
    return _DTYPES[name]


class Denoiser:
    """A U-Net or a transformer whose prompt embeddings are precomputed keys and values.

    Args:
        network: a diffusers UNet2DConditionModel or a network of isocost. Its cross-attentions, the layers of a transformer
            before them, and its dtype are changed in place.
        dtype: the whole network computes in it.
        compiled: torch.compile compiles it at the first call, for one shape. The compile cache stays on disk.
    """

    def __init__(self, network: nn.Module, dtype: SamplingDTypeName = "fp32", compiled: bool = False) -> None:
        self.dtype = _DTYPES[dtype]
        parameter = next(network.parameters())
        self.device = parameter.device
        if dtype == "bf16" and self.device.type == "cpu" and not _has_bf16_matmul():
            logger.warning("this processor has no bf16 matrix instructions: dtype bf16 will be many times slower than fp32")
        network = network if parameter.dtype == self.dtype else network.to(self.dtype)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_packed = isinstance(network, ConditionedDenoiser)
        self.caption_projection = None if is_packed else pop_caption_projection(self.network)
        attentions = [layer for layer in network.modules() if isinstance(layer, Attention) and layer.is_cross_attention]
        self.attentions = [] if is_packed else attentions
        self.cross_attention_dim = network.packed_width if isinstance(network, ConditionedDenoiser) else 0
        for attention in self.attentions:
            attention.set_processor(_PrecomputedCrossAttentionKV(self.cross_attention_dim))
            self.cross_attention_dim += 2 * attention.inner_dim
        self.guidance_embed_dim = guidance_embed_dim(network)
        self._call = self._network_call(compiled, is_packed)

    def _network_call(self, compiled: bool, is_packed: bool) -> Any:
        if compiled:
            return _compile(self.network, self.device)
        return CudaGraphModule(self.network) if self.device.type == "cuda" and not is_packed else self.network

    @property
    def embeds_guidance(self) -> bool:
        """True for a guidance-distilled student: the network takes w as an input, so one pass is enough."""
        return self.guidance_embed_dim is not None

    @torch.inference_mode()
    def project(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt embeddings [B, T, D] -> keys and values of all cross-attentions [B, T, K]; packed conditioning is returned."""
        if isinstance(self.network, ConditionedDenoiser):
            return prompt_embeds.to(self.device, self.dtype)
        # Each prompt is a call of its own, so that its bits do not depend on the other prompts.
        return torch.cat([self._project_single(row) for row in prompt_embeds.to(self.device, self.dtype).split(1)])

    def _project_single(self, prompt_embeds: Tensor) -> Tensor:
        if self.caption_projection is not None:
            prompt_embeds = self.caption_projection(prompt_embeds)
        projections = [layer for attention in self.attentions for layer in (attention.to_k, attention.to_v)]
        return torch.cat([layer(prompt_embeds) for layer in projections], dim=-1)

    def denoise(self) -> Denoise:
        """The network as a function for the engine."""

        def call(x: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance: Tensor) -> Tensor:
            x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            if self.guidance_embed_dim is None:
                return self._call(x, timesteps, prompt_embeds).sample
            embedded = guidance_embedding(guidance, self.guidance_embed_dim).to(self.dtype)
            return self._call(x, timesteps, prompt_embeds, timestep_cond=embedded).sample

        return call


class _PrecomputedCrossAttentionKV:
    """diffusers' attention; the keys and values are read from `encoder_hidden_states` [B, T, K] at index `first`."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """[B, N, A] -> [B, N, A]."""
        inner, num_heads = attn.inner_dim, attn.heads
        keys_values = encoder_hidden_states[..., self.first : self.first + 2 * inner]
        query = attn.to_q(hidden_states).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        key, value = keys_values.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def _compile(network: nn.Module, device: torch.device) -> Any:
    """Compile for one shape, once per machine (the cache stays on disk). On a CPU every call has one thread."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "isocost" / "inductor"))
    options: dict[str, Any] = {"triton.cudagraphs": True} if device.type == "cuda" else {"cpp.threads": 1}
    return torch.compile(network, dynamic=False, options=options)


def _has_bf16_matmul() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
