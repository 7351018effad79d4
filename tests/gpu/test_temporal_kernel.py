"""The kernel for attention over frames equals float32 attention as closely as PyTorch's own does."""

import pytest
import torch
from torch.nn import functional as F

from opensora.models import temporal_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU"),
]


def by_torch(qkv: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv.unbind(3))).transpose(1, 2)


@pytest.mark.parametrize("frames", [2, 5, 16, 33, 64])
@pytest.mark.parametrize("channels", [64, 72, 128])
def test_outputs_and_gradients(frames: int, channels: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, frames, 48, 3, channels, device="cuda", dtype=torch.bfloat16, generator=generator)
    assert temporal_kernel.fits(qkv)
    towards = torch.randn(2, frames, 48, channels, device="cuda", generator=generator)
    results = []
    for call, x in ((by_torch, qkv.float()), (by_torch, qkv.clone()), (temporal_kernel.attend, qkv.clone())):
        x.requires_grad_()
        out = call(x)
        (gradient,) = torch.autograd.grad(out, x, towards.to(out.dtype))
        results.append((out.detach().float(), gradient.float()))
    for exact, theirs, ours in zip(*results, strict=True):
        error = (ours - exact).norm() / exact.norm()
        assert error <= 2 * (theirs - exact).norm() / exact.norm()
        assert error < 0.01


def test_what_it_does_not_take() -> None:
    def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    assert not temporal_kernel.fits(like(1, 65, 4, 3, 72))
    assert not temporal_kernel.fits(like(1, 16, 4, 3, 160))
    assert not temporal_kernel.fits(like(1, 16, 4, 3, 72, dtype=torch.float32))
    assert not temporal_kernel.fits(torch.empty(1, 16, 4, 3, 72, dtype=torch.bfloat16))
