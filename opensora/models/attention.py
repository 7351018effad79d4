"""Self- and cross-attention as STDiT uses them.

Shapes: `B` batch, `T` frames, `S` spatial tokens, `M` query tokens, `L` text tokens, `C` channels, `A` heads,
`D` = C / A.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_HEADS = 65_535  # the second and third dimension of a CUDA grid, in which attention's kernels lay batch and heads
KeysValues = tuple[Tensor, Tensor]  # of a text, each [B, A, L, D]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection whose rows are [3, A, D]."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, M, C] -> [B, M, C]."""
        batch, length, channels = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, A, M, D]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, channels))


class TemporalAttention(nn.Module):
    """Self-attention over the frames of each location; parameters as `SelfAttention`'s.

    Queries, keys and values are projected apart, because then the heads of all locations stand side by side in memory:
    [B, T, S·A, D] is attended to as S·A heads, and nothing is transposed in either direction.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, S, C] -> [B, T, S, C]."""
        batch, frames, space, channels = x.shape
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        x = x.flatten(1, 2)  # [B, T·S, C]: linear layers add the bias within the product for three dimensions only
        if frames == 1:
            # Softmax over one key is 1, so the result is the projected value, exactly.
            return self.proj(F.linear(x, weights[2], biases[2])).view(batch, 1, space, channels)
        heads = (batch, frames, space * self.num_heads, channels // self.num_heads)
        q, k, v = (
            F.linear(x, weight, bias).view(heads).transpose(1, 2)  # [B, S·A, T, D]
            for weight, bias in zip(weights, biases, strict=True)
        )
        # In parts that a CUDA grid can hold: a 1080p frame has 130,560 heads.
        split = (part.split(MAX_HEADS, dim=1) for part in (q, k, v))
        parts = [F.scaled_dot_product_attention(*part) for part in zip(*split, strict=True)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        x = x.transpose(1, 2).reshape(batch, frames * space, channels)
        return self.proj(x).view(batch, frames, space, channels)


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens; the fused key-value rows are [2, A, D]."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def keys_values(self, text: Tensor) -> KeysValues:
        """text [B, L, C] -> keys and values."""
        kv = self.kv_linear(text).view(*text.shape[:2], 2, self.num_heads, -1)
        keys, values = (part.transpose(1, 2) for part in kv.unbind(2))
        return keys, values

    def forward(self, x: Tensor, text: Tensor | KeysValues, keep: Tensor | None) -> Tensor:
        """x [B, M, C], text [B, L, C] or its keys and values, keep [B, 1, 1, L] bool (None keeps all) -> [B, M, C]."""
        batch, length, channels = x.shape
        q = self.q_linear(x).view(batch, length, self.num_heads, -1).transpose(1, 2)  # [B, A, M, D]
        keys, values = text if isinstance(text, tuple) else self.keys_values(text)
        x = F.scaled_dot_product_attention(q, keys, values, attn_mask=keep)
        return self.proj(x.transpose(1, 2).reshape(batch, length, channels))


def keep_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """Boolean form [rows, 1, 1, L] of a text mask, which fits all heads and queries; fewer rows are tiled.

    Raises:
        ValueError: the number of rows is no multiple of the mask's rows.
    """
    if mask is None:
        return None
    if rows % mask.shape[0]:
        raise ValueError(
            f"a text mask with {mask.shape[0]} rows cannot be tiled to a batch of {rows}; "
            "give one row a sample, or one row for all"
        )
    return mask.ne(0).repeat(rows // mask.shape[0], 1)[:, None, None, :]
