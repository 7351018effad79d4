"""Self- and cross-attention as STDiT uses them.

Shapes: `B` batch, `M` query tokens, `L` text tokens, `C` channels, `A` heads, `D` = C / A.
"""

from torch import Tensor, nn
from torch.nn import functional as F


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
        if length == 1:
            # Softmax over one key is 1, so the result is the projected value, exactly.
            weight, bias = self.qkv.weight[2 * channels :], self.qkv.bias[2 * channels :]
            return self.proj(F.linear(x, weight, bias))
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, A, M, D]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, channels))


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens; the fused key-value rows are [2, A, D]."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, text: Tensor, keep: Tensor | None) -> Tensor:
        """x [B, M, C], text [B, L, C], keep [B, L] bool (None keeps all) -> [B, M, C]."""
        batch, length, channels = x.shape
        q = self.q_linear(x).view(batch, length, self.num_heads, -1).transpose(1, 2)  # [B, A, M, D]
        kv = self.kv_linear(text).view(batch, text.shape[1], 2, self.num_heads, -1)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))  # [B, A, L, D]
        bias = None if keep is None else keep[:, None, None, :]  # broadcast over heads and queries
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, length, channels))


def keep_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """Boolean form [rows, L] of a text mask; a mask with fewer rows is tiled.

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
    keep = mask.ne(0)
    return keep if mask.shape[0] == rows else keep.repeat(rows // mask.shape[0], 1)
