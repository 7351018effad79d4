"""DPM-Solver++ equals the released one on its grid and its trajectories, and converges with second order."""

import math

import pytest
import torch

from opensora.diffusion.dpm_solver import DpmSolver, grid
from opensora.diffusion.iddpm import DDIM
from opensora.models.stdit import STDiT
from tests.diffusion.conftest import Numbers

CPU = torch.device("cpu")
Y, NULL = torch.ones(2, 1, 3, 5), torch.zeros(1, 1, 3, 5)


def test_the_grid_equals_the_released_one(released: Numbers) -> None:
    torch.testing.assert_close(grid(20, CPU).timesteps, released["dpm20.t_model"], rtol=0, atol=1e-4)
    torch.testing.assert_close(grid(20, CPU).half_log_snr, released["dpm20.lambda"], rtol=1e-6, atol=1e-6)


# Twenty steps of guidance 7 through a random model make a rounding error a thousand times larger.
@pytest.mark.parametrize(("steps", "scale", "tolerance"), [(5, 4.0, 1e-4), (20, 7.0, 5e-3)])
def test_trajectories_equal_the_released_ones(
    released: Numbers, released_inputs: Numbers, released_model: STDiT, steps: int, scale: float, tolerance: float
) -> None:
    out = DpmSolver(num_sampling_steps=steps).sample(
        released_model,
        released["loop.z"],
        released_inputs["in.y"],
        released_inputs["cfg.null_y"],
        released_inputs["in.mask"],
        guidance_scale=scale,
    )
    expected = released[f"loop.dpm{steps}_cfg{scale:g}"]
    assert (out - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 37])
def test_the_grid_s_alpha_and_sigma_belong_together(steps: int) -> None:
    points = grid(steps, CPU)
    torch.testing.assert_close(points.alphas.square() + points.sigmas.square(), torch.ones(steps + 1))
    torch.testing.assert_close(points.half_log_snr, (points.alphas / points.sigmas).log(), rtol=1e-3, atol=1e-3)
    assert (points.half_log_snr.diff() > 0).all()
    assert (points.timesteps[0], points.timesteps[-1]) == (999, 0)


def gaussian(spread: float):  # type: ignore[no-untyped-def]
    """The exact noise prediction for data that is normal with that deviation."""

    def model(x: torch.Tensor, t: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        fine = grid(999, CPU)
        where = (999 - t.double()).clamp(0, 998)
        low = where.long()
        part = where - low
        log_alpha = torch.lerp(fine.alphas.double().log()[low], fine.alphas.double().log()[low + 1], part)
        alpha = log_alpha.exp()[:, None, None, None, None]
        sigma = (1 - alpha.square()).sqrt()
        return x * sigma / (alpha.square() * spread**2 + sigma.square())

    return model


def test_it_converges_to_the_exact_solution_with_second_order() -> None:
    """For Gaussian data the path is known: x keeps its quantile, so x_end / x_start is the ratio of deviations."""
    torch.manual_seed(0)
    spread, z = 0.5, torch.randn(1, 4, 1, 8, 8, dtype=torch.float64)
    points = grid(1, CPU)
    deviation = [
        math.sqrt(float(a) ** 2 * spread**2 + float(s) ** 2) for a, s in zip(points.alphas, points.sigmas, strict=True)
    ]
    exact = z * deviation[1] / deviation[0]

    def error(steps: int) -> float:
        out = DpmSolver(steps).sample(gaussian(spread), z, Y[:1], NULL, guidance_scale=1.0)
        return float((out - exact).norm() / exact.norm())

    # With few steps the last one, from 1/20 to 1/1000, decides: λ nearly triples in it.
    assert error(320) < error(160) / 3.5  # 4 for exactly second order
    ddim = DDIM(320).sample(gaussian(spread), z, Y[:1], NULL, guidance_scale=1.0)
    assert error(320) < float((ddim - exact).norm() / exact.norm()) / 5


def test_timesteps_are_fractional_and_float32() -> None:
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    out = DpmSolver(20).sample(model, torch.randn(2, 4, 1, 2, 2).bfloat16(), Y, NULL, step_noise=None)
    assert out.dtype == torch.bfloat16
    assert len(seen) == 20
    assert {t.dtype for t in seen} == {torch.float32}
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.linspace(999, 0, 21)[:-1], rtol=1e-5, atol=1e-3)


def test_no_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 or more, got 0"):
        DpmSolver(0).sample(lambda x, *_: x, torch.zeros(2, 4, 1, 2, 2), Y, NULL)
