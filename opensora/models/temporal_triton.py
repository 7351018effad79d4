"""The Triton programs of `temporal_kernel`: one program holds the queries, keys and values of all frames of one head.

Importing needs Triton, so only `temporal_kernel` does, on a GPU. `B` batch, `T` frames, `H` heads, `D` channels; qkv
[B, T, H, 3, D] and out [B, T, H, D] lie contiguous. `scale` is that of powers of two: log2(e) / √D.
"""

import triton
import triton.language as tl


@triton.jit
def forward(qkv, out, frames, heads, channels, scale, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = (t[:, None] < frames) & (d[None, :] < channels)
    row = (batch * frames + t[:, None]) * heads + head  # of [B·T·H]
    start = qkv + row * (3 * channels) + d[None, :]
    q = tl.load(start, mask=inside, other=0.0)
    k = tl.load(start + channels, mask=inside, other=0.0)
    v = tl.load(start + 2 * channels, mask=inside, other=0.0)
    scores = tl.where(t[None, :] < frames, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    result = tl.dot(weights.to(v.dtype), v)
    tl.store(out + row * channels + d[None, :], result.to(v.dtype), mask=inside)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    gradient, qkv, out, frames, heads, channels, scale, plain_scale, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // heads, place % heads
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = (t[:, None] < frames) & (d[None, :] < channels)
    row = (batch * frames + t[:, None]) * heads + head
    start = qkv + row * (3 * channels) + d[None, :]
    q = tl.load(start, mask=inside, other=0.0)
    k = tl.load(start + channels, mask=inside, other=0.0)
    v = tl.load(start + 2 * channels, mask=inside, other=0.0)
    g = tl.load(gradient + row * channels + d[None, :], mask=inside, other=0.0)
    scores = tl.where(t[None, :] < frames, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    to = out + row * (3 * channels) + d[None, :]
    of_weights = tl.dot(g, tl.trans(v))
    tl.store(to + 2 * channels, tl.dot(tl.trans(weights.to(g.dtype)), g).to(g.dtype), mask=inside)
    of_scores = weights * (of_weights - tl.sum(weights * of_weights, 1)[:, None]) * plain_scale
    of_scores = of_scores.to(g.dtype)
    tl.store(to, tl.dot(of_scores, k).to(g.dtype), mask=inside)
    tl.store(to + channels, tl.dot(tl.trans(of_scores), q).to(g.dtype), mask=inside)
