"""The block as Open-Sora 1.0 published it, without optional kernels: explicit softmax, one operation after the other.

What the speed of `opensora.models.stdit` is compared with. The parameters are those of `STDiTBlock`, so that the same
model computes either way.
"""

import torch
from torch import Tensor, nn

from opensora.models.attention import KeysValues
from opensora.models.checkpointing import checkpointed
from opensora.models.stdit import Shard, STDiT, STDiTBlock


def as_published(model: STDiT) -> STDiT:
    """Make a model compute as published, in place."""
    for block in model.blocks:
        block.__class__ = PublishedBlock
    return model


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Softmax in float32 over all scores, which are written out: [..., M, D], [..., L, D] -> [..., M, D]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores.float().softmax(-1).to(v.dtype) @ v


def self_attention(x: Tensor, attention: nn.Module) -> Tensor:
    """x [B, M, C] by the layers of a SelfAttention or TemporalAttention."""
    batch, length, channels = x.shape
    qkv = attention.qkv(x).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return attention.proj(attend(*qkv.unbind(0)).transpose(1, 2).reshape(batch, length, channels))


def normalised(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As published: the norm in the stream's type, two operations for the modulation."""
    with torch.autocast(x.device.type, enabled=False):
        return norm(x) * (1 + scale) + shift


class PublishedBlock(STDiTBlock):
    """STDiTBlock's parameters, computed as published."""

    @checkpointed
    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        t0: Tensor,
        keep: Tensor | None,
        frames: int,
        temporal_position: Tensor | None,
        shard: Shard | None = None,
    ) -> Tensor:
        assert shard is None
        assert isinstance(text, Tensor)  # encoded text is for sampling
        batch, tokens, channels = x.shape
        space = tokens // frames
        table = (self.scale_shift_table[None] + t0.view(batch, 6, channels)).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
        within = normalised(self.norm1, x, shift1, scale1).view(batch * frames, space, channels)
        x = x + gate1 * self_attention(within, self.attn).view(x.shape)

        along = x.view(batch, frames, space, channels).transpose(1, 2).reshape(batch * space, frames, channels)
        along = self_attention(
            along if temporal_position is None else along + temporal_position.to(x.dtype), self.attn_temp
        )
        x = x + gate1 * along.view(batch, space, frames, channels).transpose(1, 2).reshape(x.shape)

        q = self.cross_attn.q_linear(x).view(batch, tokens, self.cross_attn.num_heads, -1).transpose(1, 2)
        text = attend(q, *self.cross_attn.keys_values(text), keep)
        x = x + self.cross_attn.proj(text.transpose(1, 2).reshape(x.shape))
        return x + gate2 * self.mlp(normalised(self.norm2, x, shift2, scale2))
