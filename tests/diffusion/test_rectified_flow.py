"""Rectified flow: its loss and its sampler against closed forms."""

import pytest
import torch

from opensora.diffusion.rectified_flow import RectifiedFlow, shift_timesteps

X0, NOISE = torch.randn(3, 4, 2, 4, 4), torch.randn(3, 4, 2, 4, 4)
Y, NULL = torch.ones(3, 1, 2, 5), torch.zeros(3, 1, 2, 5)


def test_loss_of_a_perfect_model_is_zero_and_of_a_zero_model_is_the_velocity() -> None:
    flow, t = RectifiedFlow(), torch.tensor([0.0, 0.4, 1.0])

    def perfect(x: torch.Tensor, timestep: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        at = (timestep / 1000)[:, None, None, None, None]
        torch.testing.assert_close(x, (1 - at) * X0 + at * NOISE)
        return NOISE - X0

    loss = flow.training_losses(perfect, X0, t, NOISE, Y, None)["loss"]
    torch.testing.assert_close(loss, torch.zeros(3))
    zero = flow.training_losses(lambda x, *_: torch.zeros_like(x), X0, t, NOISE, Y, None)["loss"]
    torch.testing.assert_close(zero, (NOISE - X0).square().flatten(1).mean(1))


@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_euler_steps_reach_the_data_on_straight_paths(shift: float, steps: int) -> None:
    out = RectifiedFlow(steps, shift).sample(lambda x, *_: NOISE - X0, NOISE, Y, NULL, guidance_scale=1.0)
    torch.testing.assert_close(out, X0, atol=1e-5, rtol=1e-5)


def test_variance_channels_are_not_used() -> None:
    def wide(x: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.cat([(NOISE - X0)[: len(x)].repeat(len(x) // 3, 1, 1, 1, 1), torch.full_like(x, 99.0)], dim=1)

    out = RectifiedFlow(3).sample(wide, NOISE, Y, NULL, guidance_scale=1.0)
    torch.testing.assert_close(out, X0, atol=1e-5, rtol=1e-5)


def test_shift() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_timesteps(t, 1.0), t)
    torch.testing.assert_close(shift_timesteps(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    drawn = RectifiedFlow(shift=6.0).sample_timesteps(1000, torch.Generator().manual_seed(0))
    assert 0 < drawn.min() < drawn.mean() < drawn.max() < 1
    assert drawn.mean() > 0.7
