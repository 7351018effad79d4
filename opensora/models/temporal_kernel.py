"""Attention over the frames of one location as a kernel of its own: for few frames a GPU's usual kernels mostly wait.

PyTorch's attention works in tiles of 64 to 128 queries and keys, of which 16 frames leave most empty. Here one program
holds all frames of one head, reads them once and writes them once: four times as fast on an H200 for 16 frames, and no
faster for 64. CUDA with Triton, half precision and few frames; elsewhere PyTorch's attention is used.

Shapes: `B` batch, `T` frames, `H` heads of all locations, `D` channels a head.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

MAX_FRAMES = 32  # of which a program holds all queries, keys and values
FRAMES_A_WARP = 16
HALF = (torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None  # with PyTorch for CUDA it is


def fits(qkv: Tensor) -> bool:
    """Whether the kernel takes these [B, T, H, 3, D]."""
    return qkv.is_cuda and qkv.dtype in HALF and qkv.shape[1] <= MAX_FRAMES and qkv.shape[4] <= 128 and INSTALLED


def _sizes(qkv: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict[str, int]]:
    """Grid, sizes and constants of a launch."""
    import triton

    batch, frames, heads, _, channels = qkv.shape
    block = max(16, triton.next_power_of_2(frames))
    constants = {
        "BLOCK_T": block,
        "BLOCK_D": triton.next_power_of_2(channels),
        "num_warps": max(1, block // FRAMES_A_WARP),
    }
    return (batch * heads,), (frames, heads, channels), constants


@torch.library.custom_op("opensora::attend_in_time", mutates_args=())
def attend(qkv: Tensor) -> Tensor:
    """Attention of each head over its frames: [B, T, H, 3, D] -> [B, T, H, D]."""
    qkv = qkv.contiguous()
    grid, sizes, constants = _sizes(qkv)
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[4]))
    from opensora.models.temporal_triton import forward

    forward[grid](qkv, out, *sizes, math.log2(math.e) / math.sqrt(sizes[2]), **constants)
    return out


@torch.library.custom_op("opensora::attend_in_time_backward", mutates_args=())
def _attend_backward(gradient: Tensor, qkv: Tensor) -> Tensor:
    """Gradient of `attend`'s input; the weights are computed again, as nothing but the input is kept."""
    qkv, gradient = qkv.contiguous(), gradient.contiguous()
    grid, sizes, constants = _sizes(qkv)
    out, scale = torch.empty_like(qkv), 1 / math.sqrt(sizes[2])
    from opensora.models.temporal_triton import backward

    backward[grid](gradient, qkv, out, *sizes, math.log2(math.e) * scale, scale, **constants)
    return out


@attend.register_fake
def _(qkv: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[4]))


@_attend_backward.register_fake
def _(gradient: Tensor, qkv: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> Tensor:
    return _attend_backward(gradient, *ctx.saved_tensors)


attend.register_autograd(_differentiate, setup_context=_keep)
