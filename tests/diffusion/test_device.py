"""Tables live on the latents' device, and no step waits for it: all of it runs on a device that holds no values."""

import pytest
import torch

from opensora.diffusion.dpm_solver import DpmSolver
from opensora.diffusion.iddpm import DDIM, IDDPM
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.stdit import STDiT, STDiTConfig

SMALL = STDiTConfig((2, 4, 4), hidden_size=16, depth=1, num_heads=2, caption_channels=8, model_max_length=3)


@pytest.fixture
def model() -> STDiT:
    with torch.device("meta"):
        return STDiT(SMALL)


def inputs() -> tuple[torch.Tensor, ...]:
    with torch.device("meta"):
        return torch.randn(2, 4, 2, 4, 4), torch.randn(2, 1, 3, 8), torch.randn(1, 1, 3, 8), torch.ones(2, 3)


@pytest.mark.parametrize("sampler", [IDDPM(3), DDIM(3, eta=1.0), DpmSolver(3), RectifiedFlow(3)])
def test_sampling_reads_no_value_back(model: STDiT, sampler: IDDPM | DDIM | DpmSolver | RectifiedFlow) -> None:
    out = sampler.sample(lambda *a: model(*a), *inputs())
    assert (out.device.type, out.shape) == ("meta", (2, 4, 2, 4, 4))


@pytest.mark.parametrize("process", [IDDPM(), RectifiedFlow()])
def test_training_reads_no_value_back(model: STDiT, process: IDDPM | RectifiedFlow) -> None:
    x0, y, _, mask = inputs()
    t = torch.zeros(2, dtype=torch.long, device="meta")
    loss = process.training_losses(lambda *a: model(*a), x0, t, torch.randn_like(x0), y, mask)["loss"]
    loss.mean().backward()
    assert loss.shape == (2,)
