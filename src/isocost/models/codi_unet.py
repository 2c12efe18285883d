"""CoDi: a U-Net with a second encoder for the condition, used in conditional consistency distillation.

CoDi (arXiv 2310.01407, section 4.1): the adapter is a copy of the encoder, as in ControlNet (arXiv 2302.05543). The decoder
receives `h' = (1 - mu) h + mu h_c`, with one learnable mu per feature map. mu starts at 0, so the first forward pass equals the
U-Net's own. `h_c` are the adapter's features of the condition c:

- `concat_cond` (super-resolution, as in the paper): c is the conditioning latent, appended to the noisy latent.
- `noisy` (text-to-image): c is the prompt embeddings and the noisy latent itself, that is all inputs of the network.

Shapes: B batch, C latent channels, L latent size, T tokens, D width of the prompt embeddings, G width of the guidance
embedding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from isocost.models.unet import init_config

ADAPTER_PARTS = ("time_embedding", "conv_in", "down_blocks", "mid_block")


class CoDiUNet(ModelMixin, ConfigMixin):
    """A U-Net whose decoder receives a mixture of the features of its own encoder and of the adapter."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, unet_config: dict[str, Any], condition: Literal["noisy", "concat_cond"]) -> None:
        """
        Args:
            unet_config: config of the U-Net itself, which has C input channels.
            condition: input of the adapter; see the module docstring.
        """
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(unet_config)
        copy = UNet2DConditionModel.from_config(unet_config)  # copy.deepcopy would leave the mode of fake tensors
        self.adapter = nn.ModuleDict({name: getattr(copy, name) for name in ADAPTER_PARTS})
        num_maps = 1 + sum(_num_maps(block) for block in self.unet.down_blocks) + 1
        self.mu = nn.Parameter(torch.zeros(num_maps))

    @staticmethod
    def from_unet(unet: UNet2DConditionModel, condition: Literal["noisy", "concat_cond"]) -> CoDiUNet:
        """Create a CoDi network from a copy of a trained U-Net; the adapter starts as a copy of its encoder."""
        network = CoDiUNet(init_config(unet), condition).to(next(unet.parameters()).device)
        weights = unet.state_dict()
        network.unet.load_state_dict(weights)
        encoder = {name: value for name, value in weights.items() if name.split(".")[0] in ADAPTER_PARTS}
        network.adapter.load_state_dict(encoder)
        return network

    def freeze_unet(self) -> None:
        """Train only the adapter and mu: CoDi's parameter-efficient form (arXiv 2310.01407, section 4.3)."""
        self.unet.requires_grad_(False)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> UNet2DConditionOutput:
        """Apply the network.

        Args:
            sample: noisy latents [B, C, L, L]; for `concat_cond` [B, 2 C, L, L] with the condition in the last C channels.
            timestep: [B].
            encoder_hidden_states: prompt embeddings [B, T, D].
            timestep_cond: guidance embedding [B, G].

        Returns:
            An output whose `sample` is [B, C, L, L].
        """
        noisy, condition = sample, sample
        if self.config.condition == "concat_cond":
            noisy, condition = sample.chunk(2, dim=1)
        time_features = self.unet.get_time_embed(sample=noisy, timestep=timestep)
        unet_time = self.unet.time_embedding(time_features, timestep_cond)
        unet_maps = _encode(self.unet, noisy, unet_time, encoder_hidden_states)
        adapter_maps = _encode(
            self.adapter, condition, self.adapter["time_embedding"](time_features, timestep_cond), encoder_hidden_states
        )
        mixed = [torch.lerp(h, h_c, mu) for h, h_c, mu in zip(unet_maps, adapter_maps, self.mu, strict=True)]
        return UNet2DConditionOutput(sample=_decode(self.unet, mixed, unet_time, encoder_hidden_states))


def _num_maps(block: nn.Module) -> int:
    """Number of feature maps that an encoder block passes to the decoder."""
    return len(block.resnets) + (0 if block.downsamplers is None else len(block.downsamplers))  # type: ignore[arg-type]


def _encode(encoder: Any, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> list[Tensor]:
    """Feature maps of an encoder; the last one is that of the middle block."""
    module = encoder.__getitem__ if isinstance(encoder, nn.ModuleDict) else encoder.__getattr__
    x = module("conv_in")(x)
    maps = [x]
    blocks: Any = module("down_blocks")
    for block in blocks:
        if getattr(block, "has_cross_attention", False):
            x, block_maps = block(hidden_states=x, temb=time, encoder_hidden_states=prompt_embeds)
        else:
            x, block_maps = block(hidden_states=x, temb=time)
        maps += block_maps
    return [*maps, module("mid_block")(x, time, encoder_hidden_states=prompt_embeds)]


def _decode(unet: Any, maps: list[Tensor], time: Tensor, prompt_embeds: Tensor) -> Tensor:
    *skips, x = maps
    for block in unet.up_blocks:
        block_skips = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        options: dict[str, Any] = {
            "res_hidden_states_tuple": block_skips,
            "upsample_size": skips[-1].shape[2:] if skips else None,
        }
        if getattr(block, "has_cross_attention", False):
            options["encoder_hidden_states"] = prompt_embeds
        x = block(hidden_states=x, temb=time, **options)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
