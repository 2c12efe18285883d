"""A U-Net and its text encoder as one network, for trainings that change both.

Shapes: B rows, C latent channels, L latent side, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from isocost.config.types import PredictionType
from isocost.models.checkpoint import save_networks

TEXT_FOLDER = "text_encoder"


class UNetWithTextEncoder(nn.Module):
    """Sees token ids where a U-Net sees prompt embeddings. The text encoder draws nothing at random: its dropout stays off."""

    def __init__(self, unet: UNet2DConditionModel, text: nn.Module, padding_id: int | None) -> None:
        """`padding_id` is what the encoder's attention leaves out; None where it leaves out nothing."""
        super().__init__()
        # BERT's pooler makes what nobody uses here, and has nothing to learn from; it stands aside until the encoder is saved.
        self._aside = {name: getattr(text, name) for name in ("pooler",) if getattr(text, name, None) is not None}
        for name in self._aside:
            setattr(text, name, None)
        self.unet, self.text_encoder, self.padding_id = unet, text.requires_grad_(True), padding_id

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Any:
        """[B, C, L, L], [B], [B, T] of whole numbers -> the U-Net's output."""
        ids = token_ids.long()
        mask = None if self.padding_id is None else (ids != self.padding_id).long()
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.unet(noisy, timesteps, states)

    def train(self, mode: bool = True) -> UNetWithTextEncoder:
        """The U-Net's mode."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Of the U-Net."""
        self.unet.enable_gradient_checkpointing()

    def save(
        self,
        folder: Path,
        tokenizer: Any,
        prediction_type: PredictionType,
        rescale_betas_zero_snr: bool,
        weights: Iterable[tuple[str, Tensor]],
    ) -> None:
        """Write `unet/`, `scheduler/` and `text_encoder/` from names and tensors in the order of the parameters."""
        every = iter(weights)
        of_unet = islice(every, len(list(self.unet.parameters())))
        save_networks(folder, self.unet, prediction_type, rescale_betas_zero_snr, of_unet)
        learned = {name.removeprefix("text."): tensor for name, tensor in every}
        kept = {f"{name}.{key}": tensor for name, part in self._aside.items() for key, tensor in part.state_dict().items()}
        weights_of_text = self.text_encoder.state_dict() | learned | kept
        self.text_encoder.save_pretrained(folder / TEXT_FOLDER, state_dict=weights_of_text)  # type: ignore[operator]
        tokenizer.save_pretrained(folder / TEXT_FOLDER)
