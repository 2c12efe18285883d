"""The text encoders of published pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from isocost.errors import ConfigError
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.pretrained.files import INDEX, load_module, read_config
from isocost.models.pretrained.pipeline_config import encoders_of, kind_at
from isocost.models.pretrained.wrappers import pack_mask, pack_pooled


class PipelineTextEncoder:
    """Captions as the pipeline of a published checkpoint encodes them, packed as its network takes them (`hub/packed.py`).

    sd: CLIP's last states. sdxl: the states of two CLIPs before their last layer, side by side, and the pooled caption of the
    second. pixart: T5's states with their mask, of the caption in lower case (diffusers' pipeline with `clean_caption=False`).
    sd3: two CLIPs' states as sdxl's, T5's below them (zeros where the pipeline has no T5), both pooled captions. flux: T5's
    states without their mask, and CLIP's pooled caption.
    """

    def __init__(self, folder: Path, info: CheckpointInfo, device: torch.device | str = "cpu") -> None:
        """
        Args:
            folder: the pipeline's.
            info: what the checkpoint says of itself.
            device: where the encoders run.

        Raises:
            ConfigError: an encoder or a tokenizer does not load, or the states are not as wide as the denoiser takes them.
        """
        given = info.pretrained
        assert given is not None, "ours have a MiniLMTextEncoder"
        self.kind, self.max_tokens, self.null_is_zero = given.kind, given.max_tokens, given.null_is_zero
        self.cross_attention_dim = info.model.cross_attention_dim
        self.device = torch.device(device)
        parts = encoders_of(kind_at(folder), read_config(folder / INDEX), folder)
        self.encoders = {part: load_encoder(folder / part, name).to(self.device) for part, name in parts.items()}
        self.tokenizers = {part: load_tokenizer(folder / part.replace("text_encoder", "tokenizer")) for part in parts}
        width = self.encode([""]).shape[-1] - (self.kind == "pixart")
        if width != self.cross_attention_dim:
            raise ConfigError(
                f"{folder}: the text encoder's states are {width} wide, the denoiser takes {self.cross_attention_dim}"
            )

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> float32 [N, T, D], packed."""
        texts = list(captions)
        if self.kind == "sd":
            return self._states("text_encoder", texts)[0]
        if self.kind == "pixart":
            states, mask = self._t5("text_encoder", [text.lower().strip() for text in texts], masked=True)
            return pack_mask(states, mask)
        if self.kind == "flux":
            pooled = self._states("text_encoder", texts)[1]
            return pack_pooled(self._t5("text_encoder_2", texts, masked=False)[0], pooled)
        first, first_pooled = self._states("text_encoder", texts, before_last=True)
        second, second_pooled = self._states("text_encoder_2", texts, before_last=True)
        both = torch.cat([first, second], dim=-1)
        if self.kind == "sdxl":
            return pack_pooled(both, second_pooled)
        widened = functional.pad(both, (0, self.cross_attention_dim - both.shape[-1]))
        if "text_encoder_3" in self.encoders:
            third = self._t5("text_encoder_3", texts, masked=False)[0]
        else:
            third = widened.new_zeros(len(texts), self.max_tokens, self.cross_attention_dim)
        return pack_pooled(torch.cat([widened, third], dim=1), torch.cat([first_pooled, second_pooled], dim=-1))

    def _states(self, part: str, texts: list[str], before_last: bool = False) -> tuple[Tensor, Tensor]:
        """CLIP's states [N, T, D] and pooled captions [N, P], projected where the encoder projects them."""
        encoder: Any = self.encoders[part]
        tokens = self._tokens(part, texts, self.tokenizers[part].model_max_length)
        masked = bool(getattr(encoder.config, "use_attention_mask", False))
        mask = tokens["attention_mask"] if masked and self.kind == "sd" else None
        said = encoder(tokens["input_ids"], attention_mask=mask, output_hidden_states=before_last)
        states = said.hidden_states[-2] if before_last else said.last_hidden_state
        projected = getattr(said, "text_embeds", None)
        return states.float(), (said.pooler_output if projected is None else projected).float()

    def _t5(self, part: str, texts: list[str], masked: bool) -> tuple[Tensor, Tensor]:
        """T5's states [N, T, D] and the mask of what is no padding [N, T]."""
        tokens = self._tokens(part, texts, self.max_tokens)
        mask = tokens["attention_mask"]
        said = self.encoders[part](tokens["input_ids"], attention_mask=mask if masked else None)
        return said.last_hidden_state.float(), mask

    def _tokens(self, part: str, texts: list[str], most: int) -> Any:
        told = self.tokenizers[part](texts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        return told.to(self.device)


def load_encoder(part: Path, name: str) -> nn.Module:
    """A text encoder by its class, float32."""
    import transformers

    kinds = {one.__name__: one for one in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)}
    return load_module(kinds.get(name, transformers.T5EncoderModel), part)


def load_tokenizer(part: Path) -> Any:
    """
    Raises:
        ConfigError: nothing in the folder makes a tokenizer here.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(part))
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ConfigError(f"{part}: no tokenizer loads from there: {' '.join(str(error).split())[:200]}") from error
