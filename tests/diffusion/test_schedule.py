"""The schedule equals the released one, and its formulas hold for any number of steps."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opensora.diffusion.schedule import Tables, kept_timesteps, tables
from tests.shared import shared

CPU = torch.device("cpu")
STEPS = (2, 3, 5, 17, 20, 50, 100, 250, 999, 1000)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("betas", "betas"),
        ("alphas_cumprod", "alphas_cumprod"),
        ("posterior_variance", "posterior_variance"),
        ("posterior_log_variance", "posterior_log_variance_clipped"),
        ("posterior_mean_x0", "posterior_mean_coef1"),
        ("posterior_mean_xt", "posterior_mean_coef2"),
    ],
)
def test_tables_equal_the_released_ones(field: str, name: str) -> None:
    released = load_file(shared("fixtures/fixture_iddpm.safetensors"))[f"sched1000.{name}"]
    torch.testing.assert_close(getattr(tables(1000, CPU), field), released, rtol=1e-12, atol=1e-15)


def test_kept_timesteps_equal_the_released_ones() -> None:
    info = json.loads(shared("fixtures/fixture_iddpm.json").read_text())["info"]
    for steps in (5, 20, 50, 100, 250):
        assert kept_timesteps(steps) == info[f"timestep_map_{steps}"]
    released = load_file(shared("fixtures/fixture_iddpm.safetensors"))
    torch.testing.assert_close(tables(100, CPU).betas, released["resp100.betas"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_kept_timesteps_span_the_schedule_and_rise(steps: int) -> None:
    kept = kept_timesteps(steps)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, steps)
    gaps = {after - before for before, after in zip(kept[:-1], kept[1:], strict=True)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("steps", STEPS)
def test_a_respaced_process_has_the_full_one_s_marginals(steps: int) -> None:
    full, few = tables(1000, CPU), tables(steps, CPU)
    kept = torch.tensor(kept_timesteps(steps))
    torch.testing.assert_close(few.alphas_cumprod, full.alphas_cumprod[kept])
    torch.testing.assert_close((1 - few.betas).cumprod(0), few.alphas_cumprod)


@pytest.mark.parametrize("steps", STEPS)
def test_the_posterior_is_bayes_rule(steps: int) -> None:
    """q(x_prev | x_t, x0) from the product of two Gaussians, for every kept timestep but the first."""
    table = Tables(*(value[1:] for value in tables(steps, CPU)))
    prior = 1 / (1 - table.alphas_cumprod_prev)  # precision of q(x_prev | x0), mean √ᾱ_prev · x0
    step = (1 - table.betas) / table.betas  # of q(x_t | x_prev) as a function of x_prev, mean x_t / √α
    torch.testing.assert_close(table.posterior_variance, 1 / (prior + step))
    mean_x0 = table.posterior_variance * prior * table.alphas_cumprod_prev.sqrt()
    mean_xt = table.posterior_variance * step / (1 - table.betas).sqrt()
    torch.testing.assert_close(table.posterior_mean_x0, mean_x0)
    torch.testing.assert_close(table.posterior_mean_xt, mean_xt)


def test_tables_are_built_once() -> None:
    assert tables(100, CPU) is tables(100, CPU)
    assert tables(100, CPU).timesteps.dtype == torch.float32


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_named(steps: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1000, got {steps}"):
        kept_timesteps(steps)
