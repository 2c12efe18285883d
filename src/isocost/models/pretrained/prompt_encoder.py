"""Text encoders of published pipelines.

Shapes: N prompts, T tokens, D width of the prompt embeddings, P width of a pooled embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.pretrained.files import MODEL_INDEX, first_line, load_module, load_tokenizer, read_config
from isocost.models.pretrained.pipeline_config import MAX_PROMPT_TOKENS, family_at, text_encoder_classes
from isocost.models.pretrained.wrappers import pack_mask, pack_pooled
from isocost.models.text_encoder import TokenStatistics, token_statistics

TEXTUAL_INVERSION_FAMILIES = ("sd", "sdxl", "flux")
"""Families whose diffusers pipelines read textual inversions (arXiv 2208.01618)."""
logger = logging.getLogger(__name__)


class PipelineTextEncoder:
    """Encodes prompts as the pipeline of a published checkpoint does, packed for its denoiser (see `wrappers.py`).

    - sd: last hidden states of CLIP.
    - sdxl: hidden states of two CLIPs before their last layer, concatenated, and the pooled embedding of the second.
    - pixart: hidden states of T5 with their mask; prompts in lower case (diffusers' pipeline with `clean_caption=False`).
    - sd3: hidden states of two CLIPs as for sdxl, followed by the tokens of T5 (zeros if the pipeline has no T5), and both
      pooled embeddings.
    - flux: hidden states of T5 without their mask, and the pooled embedding of CLIP.
    """

    def __init__(self, folder: Path, info: CheckpointInfo, device: torch.device | str = "cpu") -> None:
        """
        Args:
            folder: pipeline folder.
            info: metadata of the checkpoint.
            device: device of the text encoders.

        Raises:
            ConfigError: a text encoder or tokenizer cannot be loaded, or the width of the prompt embeddings does not fit the
                denoiser.
        """
        spec = info.pretrained
        assert spec is not None, "checkpoints of isocost have a MiniLMTextEncoder"
        self.family, self.max_tokens, self.null_is_zero = spec.kind, spec.max_tokens, spec.null_is_zero
        self.cross_attention_dim = info.model.cross_attention_dim
        self.device = torch.device(device)
        classes = text_encoder_classes(family_at(folder), read_config(folder / MODEL_INDEX), folder)
        self.encoders = {name: load_encoder(folder / name, cls).to(self.device) for name, cls in classes.items()}
        self.tokenizers = {name: load_tokenizer(folder / name.replace("text_encoder", "tokenizer")) for name in classes}
        self._check_tokenizers(folder)
        try:
            width = self.encode([""]).shape[-1] - (self.family == "pixart")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a tokenizer and an encoder that do not fit raise many kinds of errors
            raise ConfigError(f"{folder}: its text encoders and tokenizers do not run: {first_line(error)}") from error
        if width != self.cross_attention_dim:
            raise ConfigError(
                f"{folder}: the text encoder's embeddings have width {width}, the denoiser needs {self.cross_attention_dim}"
            )

    def _is_t5(self, name: str) -> bool:
        return type(self.encoders[name]).__name__ == "T5EncoderModel"

    def _check_tokenizers(self, folder: Path) -> None:
        for name, tokenizer in self.tokenizers.items():
            path, limit = folder / name.replace("text_encoder", "tokenizer"), tokenizer.model_max_length
            if not self._is_t5(name) and not 3 <= limit <= MAX_PROMPT_TOKENS:
                raise ConfigError(f"{path}: model_max_length = {limit}: must be the number of tokens of a prompt, usually 77")
            encoder: Any = self.encoders[name]
            if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
                raise ConfigError(f"{path}: has {len(tokenizer)} tokens, more than the text encoder's embeddings")

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Packed prompt embeddings of prompts, float32 [N, T, D]."""
        texts = list(prompts)
        if self.family == "sd":
            return self._encode_clip("text_encoder", texts)[0]
        if self.family == "pixart":
            embeds, mask = self._encode_t5("text_encoder", [text.lower().strip() for text in texts], masked=True)
            return pack_mask(embeds, mask)
        if self.family == "flux":
            pooled = self._encode_clip("text_encoder", texts)[1]
            return pack_pooled(self._encode_t5("text_encoder_2", texts, masked=False)[0], pooled)
        first, first_pooled = self._encode_clip("text_encoder", texts, before_last=True)
        second, second_pooled = self._encode_clip("text_encoder_2", texts, before_last=True)
        clip = torch.cat([first, second], dim=-1)
        if self.family == "sdxl":
            return pack_pooled(clip, second_pooled)
        clip = functional.pad(clip, (0, self.cross_attention_dim - clip.shape[-1]))
        if "text_encoder_3" in self.encoders:
            t5 = self._encode_t5("text_encoder_3", texts, masked=False)[0]
        else:
            t5 = clip.new_zeros(len(texts), self.max_tokens, self.cross_attention_dim)
        return pack_pooled(torch.cat([clip, t5], dim=1), torch.cat([first_pooled, second_pooled], dim=-1))

    def token_statistics(self, prompts: Sequence[str]) -> TokenStatistics:
        """Count the prompts that are cut or have unknown words, by the tokenizer that reads the most tokens."""
        name = next((name for name in self.encoders if self._is_t5(name)), "text_encoder")
        max_tokens = self.max_tokens if self._is_t5(name) else self.tokenizers[name].model_max_length
        texts = list(prompts)
        if self.family in TEXTUAL_INVERSION_FAMILIES:
            texts = _expand_learned_tokens(texts, self.tokenizers[name])
        return token_statistics(self.tokenizers[name], texts, max_tokens)

    def _encode_clip(self, name: str, texts: list[str], before_last: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, D] and pooled embeddings [N, P] of a CLIP, projected if it has a projection."""
        encoder: Any = self.encoders[name]
        tokens = self._tokenize(name, texts, self.tokenizers[name].model_max_length)
        masked = bool(getattr(encoder.config, "use_attention_mask", False))
        mask = tokens["attention_mask"] if masked and self.family == "sd" else None
        output = encoder(tokens["input_ids"], attention_mask=mask, output_hidden_states=before_last)
        hidden_states = output.hidden_states[-2] if before_last else output.last_hidden_state
        projected = getattr(output, "text_embeds", None)
        return hidden_states.float(), (output.pooler_output if projected is None else projected).float()

    def _encode_t5(self, name: str, texts: list[str], masked: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, D] of T5, and the attention mask [N, T], which is 0 for padding."""
        tokens = self._tokenize(name, texts, self.max_tokens)
        mask = tokens["attention_mask"]
        output = self.encoders[name](tokens["input_ids"], attention_mask=mask if masked else None)
        return output.last_hidden_state.float(), mask

    def _tokenize(self, name: str, texts: list[str], max_tokens: int) -> Any:
        if self.family in TEXTUAL_INVERSION_FAMILIES:
            texts = _expand_learned_tokens(texts, self.tokenizers[name])
        tokens = self.tokenizers[name](texts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
        return tokens.to(self.device)


def _expand_learned_tokens(texts: list[str], tokenizer: Any) -> list[str]:
    """Replace the token of a textual inversion with several vectors by its tokens "TOKEN TOKEN_1 ...", as diffusers does."""
    expanded = TextualInversionLoaderMixin().maybe_convert_prompt(texts, tokenizer)
    assert isinstance(expanded, list), "a list gives a list"
    return expanded


def load_encoder(folder: Path, class_name: str) -> nn.Module:
    """Load a text encoder by its class name, in float32."""
    return load_module(_encoder_class(class_name), folder)


def _encoder_class(name: str) -> Any:
    import transformers

    clip_classes = {cls.__name__: cls for cls in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)}
    return clip_classes.get(name, transformers.T5EncoderModel)


def encoder_on_meta(folder: Path, class_name: str) -> nn.Module:
    """Build a text encoder on the meta device from its config, which needs no memory.

    Raises:
        ConfigError: transformers cannot build it.
    """
    encoder_class = _encoder_class(class_name)
    try:
        config = encoder_class.config_class.from_pretrained(str(folder))
        with torch.device("meta"):
            encoder: nn.Module = encoder_class(config)
    except Exception as error:  # transformers raises many kinds of errors for a wrong config
        raise ConfigError(f"{folder}: cannot build a {class_name} from its config: {first_line(error)}") from error
    return encoder
