"""A U-Net with a second encoder that sees the condition: the network of conditional consistency distillation.

CoDi (arXiv 2310.01407, section 4.1): the adapter is a copy of the encoder, as ControlNet's is (arXiv 2302.05543), and what
the decoder is given is `h' = (1 - mu) h + mu h_c`, with one learnable mu a feature map that starts at 0, so the first forward
is the U-Net's own. `h_c` are the adapter's features of the condition c:

- `beside` (super-resolution, the paper's own use): c is the latent that stands behind the noisy one.
- `noisy` (text-to-image): c is the caption's states together with the noisy latent itself, all that the network is given.

Shapes: B rows, C latent channels, L latent side, T tokens, D width of the prompt embeddings, G width of the guidance embedding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from isocost.models.unet import plain_config

ADAPTER_PARTS = ("time_embedding", "conv_in", "down_blocks", "mid_block")


class CoDiUNet(ModelMixin, ConfigMixin):
    """What a U-Net sees and says; its decoder reads a mixture of its own encoder's features and the adapter's."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, unet_config: dict[str, Any], condition: Literal["noisy", "concat_cond"]) -> None:
        """`unet_config` is that of the U-Net itself, which takes C channels."""
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(unet_config)
        other = UNet2DConditionModel.from_config(unet_config)  # a deep copy would leave a fake tensor's mode
        self.adapter = nn.ModuleDict({name: getattr(other, name) for name in ADAPTER_PARTS})
        num_maps = 1 + sum(_num_maps(block) for block in self.unet.down_blocks) + 1
        self.mu = nn.Parameter(torch.zeros(num_maps))

    @staticmethod
    def of(unet: UNet2DConditionModel, condition: Literal["noisy", "concat_cond"]) -> CoDiUNet:
        """Around a trained U-Net, which is not changed; the adapter begins as its encoder."""
        adapted = CoDiUNet(plain_config(unet), condition).to(next(unet.parameters()).device)
        weights = unet.state_dict()
        adapted.unet.load_state_dict(weights)
        encoder = {name: value for name, value in weights.items() if name.split(".")[0] in ADAPTER_PARTS}
        adapted.adapter.load_state_dict(encoder)
        return adapted

    def freeze_unet(self) -> None:
        """Let the adapter and mu learn alone: CoDi's parameter-efficient form (arXiv 2310.01407, section 4.3)."""
        self.unet.requires_grad_(False)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> UNet2DConditionOutput:
        """[B, C or 2C, L, L], [B], [B, T, D], [B, G] -> raw output [B, C, L, L]."""
        noisy, condition = sample, sample
        if self.config.condition == "concat_cond":
            noisy, condition = sample.chunk(2, dim=1)
        embedded = self.unet.get_time_embed(sample=noisy, timestep=timestep)
        own_time = self.unet.time_embedding(embedded, timestep_cond)
        own = _encode(self.unet, noisy, own_time, encoder_hidden_states)
        theirs = _encode(
            self.adapter, condition, self.adapter["time_embedding"](embedded, timestep_cond), encoder_hidden_states
        )
        mixed = [torch.lerp(h, h_c, mu) for h, h_c, mu in zip(own, theirs, self.mu, strict=True)]
        return UNet2DConditionOutput(sample=_decode(self.unet, mixed, own_time, encoder_hidden_states))


def _num_maps(block: nn.Module) -> int:
    """Feature maps that a block of the encoder hands to the decoder."""
    return len(block.resnets) + (0 if block.downsamplers is None else len(block.downsamplers))  # type: ignore[arg-type]


def _encode(parts: Any, x: Tensor, time: Tensor, states: Tensor) -> list[Tensor]:
    """Feature maps of an encoder, the one of the middle last."""
    part = parts.__getitem__ if isinstance(parts, nn.ModuleDict) else parts.__getattr__
    x = part("conv_in")(x)
    maps = [x]
    blocks: Any = part("down_blocks")
    for block in blocks:
        if getattr(block, "has_cross_attention", False):
            x, further = block(hidden_states=x, temb=time, encoder_hidden_states=states)
        else:
            x, further = block(hidden_states=x, temb=time)
        maps += further
    return [*maps, part("mid_block")(x, time, encoder_hidden_states=states)]


def _decode(unet: Any, maps: list[Tensor], time: Tensor, states: Tensor) -> Tensor:
    *skips, x = maps
    for block in unet.up_blocks:
        given = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        size = skips[-1].shape[2:] if skips else None
        if getattr(block, "has_cross_attention", False):
            x = block(
                hidden_states=x, temb=time, res_hidden_states_tuple=given, encoder_hidden_states=states, upsample_size=size
            )
        else:
            x = block(hidden_states=x, temb=time, res_hidden_states_tuple=given, upsample_size=size)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
