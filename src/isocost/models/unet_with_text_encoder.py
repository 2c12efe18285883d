"""A U-Net and its text encoder as one network, for training both.

Shapes: B batch, C latent channels, L latent size, T tokens.
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
from isocost.utils.progress import no_library_progress

TEXT_FOLDER = "text_encoder"


class UNetWithTextEncoder(nn.Module):
    """A U-Net that takes token ids instead of prompt embeddings. The text encoder's dropout stays off during training."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module, padding_id: int | None) -> None:
        """
        Args:
            unet: the denoiser.
            text_encoder: a transformers text encoder; its `pooler` is removed from the module until `save`.
            padding_id: token id that the encoder's attention masks; None if it masks nothing.
        """
        super().__init__()
        # The output of BERT's pooler is not used here, so the pooler gets no gradient.
        self._unused_modules = {
            name: getattr(text_encoder, name) for name in ("pooler",) if getattr(text_encoder, name, None) is not None
        }
        for name in self._unused_modules:
            setattr(text_encoder, name, None)
        self.unet, self.text_encoder, self.padding_id = unet, text_encoder.requires_grad_(True), padding_id

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Any:
        """Apply the network to noisy latents [B, C, L, L], timesteps [B] and integer token ids [B, T].

        Returns:
            The U-Net's output.
        """
        ids = token_ids.long()
        mask = None if self.padding_id is None else (ids != self.padding_id).long()
        prompt_embeds = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.unet(noisy, timesteps, prompt_embeds)

    def train(self, mode: bool = True) -> UNetWithTextEncoder:
        """Set the mode of the U-Net; the text encoder stays in evaluation mode."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Enable gradient checkpointing in the U-Net."""
        self.unet.enable_gradient_checkpointing()

    def save(
        self,
        folder: Path,
        tokenizer: Any,
        prediction_type: PredictionType,
        rescale_betas_zero_snr: bool,
        weights: Iterable[tuple[str, Tensor]],
    ) -> None:
        """Write `unet/`, `scheduler/` and `text_encoder/`.

        Args:
            folder: folder to write into.
            tokenizer: tokenizer, saved with the text encoder.
            prediction_type: prediction type to write into the scheduler's config.
            rescale_betas_zero_snr: whether the schedule is rescaled to zero terminal SNR.
            weights: names and tensors in the order of the parameters of this module.
        """
        remaining = iter(weights)
        unet_weights = islice(remaining, len(list(self.unet.parameters())))
        save_networks(folder, self.unet, prediction_type, rescale_betas_zero_snr, unet_weights)
        trained = {name.removeprefix("text_encoder."): tensor for name, tensor in remaining}
        unused = {
            f"{name}.{key}": tensor
            for name, module in self._unused_modules.items()
            for key, tensor in module.state_dict().items()
        }
        text_weights = self.text_encoder.state_dict() | trained | unused
        with no_library_progress():
            self.text_encoder.save_pretrained(folder / TEXT_FOLDER, state_dict=text_weights)  # type: ignore[operator]
        tokenizer.save_pretrained(folder / TEXT_FOLDER)
