"""Self- and cross-attention as STDiT uses them.

Shapes: `B` batch, `T` frames, `S` spatial tokens, `M` query tokens, `L` text tokens, `C` channels, `A` heads,
`D` = C / A.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora.models import temporal_kernel

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

    For the product the rows of the projection are put into the order [A, 3, D], because then the heads of all locations
    stand at equal distances: [B, T, S·A, 3, D] is attended to as S·A heads, and nothing is transposed.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, S, C] -> [B, T, S, C]."""
        batch, frames, space, channels = x.shape
        x = x.flatten(1, 2)  # [B, T·S, C]: linear layers add the bias within the product for three dimensions only
        if frames == 1:
            # Softmax over one key is 1, so the result is the projected value, exactly.
            x = F.linear(x, self.qkv.weight[-channels:], self.qkv.bias[-channels:])
            return self.proj(x).view(batch, 1, space, channels)
        qkv = F.linear(x, self._by_head(self.qkv.weight), self._by_head(self.qkv.bias))
        qkv = qkv.view(batch, frames, space * self.num_heads, 3, channels // self.num_heads)
        x = attend_in_time(qkv)  # [B, T, S·A, D]
        return self.proj(x.reshape(batch, frames * space, channels)).view(batch, frames, space, channels)

    def _by_head(self, rows: Tensor) -> Tensor:
        """Rows [3, A, D] of a weight or bias -> [A, 3, D]; far less to copy than what is projected."""
        return rows.unflatten(0, (3, self.num_heads, -1)).transpose(0, 1).flatten(0, 2)


def attend_in_time(qkv: Tensor) -> Tensor:
    """Queries, keys and values [B, T, S·A, 3, D] -> [B, T, S·A, D], each head by itself."""
    if temporal_kernel.fits(qkv):
        return temporal_kernel.attend(qkv)
    # In parts that a CUDA grid can hold: a 1080p frame has 130,560 heads.
    parts = [
        F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads.unbind(3)))  # [B, S·A, T, D]
        for heads in qkv.split(MAX_HEADS, dim=2)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)


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

    def forward(self, x: Tensor, text: Tensor | KeysValues, keep: Tensor | None, groups: int = 1) -> Tensor:
        """x [B, M, C], text [B, L, C] or its keys and values, keep [B, 1, 1, L] bool (None keeps all) -> [B, M, C].

        In `groups` of M / groups queries, as frames, a GPU sums up the gradients of a text's few keys side by side; its
        kernels share the work out by keys and heads, of which one group has too few.
        """
        batch, length, channels = x.shape
        q = self.q_linear(x).view(batch * groups, length // groups, self.num_heads, -1).transpose(1, 2)
        keys, values = text if isinstance(text, tuple) else self.keys_values(text)
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=0), values.repeat_interleave(groups, dim=0)
            keep = None if keep is None else keep.repeat_interleave(groups, dim=0)
        x = F.scaled_dot_product_attention(q, keys, values, attn_mask=keep)  # [B·groups, A, M / groups, D]
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
