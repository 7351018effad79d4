"""Rectified flow: its loss, its sampler and guidance against closed forms."""

import pytest
import torch

from opensora.diffusion.guidance import guided_prediction
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


@pytest.mark.parametrize(("mode", "guided"), [("v1", 3), ("full", 4)])
def test_guidance_runs_both_halves_in_one_batch(mode: str, guided: int) -> None:
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append((x.shape[0], mask.shape[0]))
        return y.mean((1, 2, 3))[:, None, None, None, None].expand(-1, 8, *x.shape[2:]).clone()

    mask = torch.ones(3, 2)
    out = guided_prediction(model, X0, torch.zeros(3), Y, NULL, mask, 5.0, mode)  # type: ignore[arg-type]
    assert calls == [(6, 6)]
    assert out.shape == (3, 8, 2, 4, 4)
    assert (out[:, :guided] == 5.0).all()  # 0 + 5 · (1 − 0)
    assert (out[:, guided:] == 1.0).all()  # the conditional prediction
