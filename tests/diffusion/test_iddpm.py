"""IDDPM equals the released process: losses, gradients, steps and whole trajectories; and it samples what it knows."""

import pytest
import torch

from opensora.diffusion.iddpm import DDIM, IDDPM, ancestral_step, ddim_step
from opensora.diffusion.schedule import kept_timesteps, tables
from opensora.models.stdit import STDiT
from tests.diffusion.conftest import Numbers

CPU = torch.device("cpu")
Y, NULL = torch.ones(2, 1, 3, 5), torch.zeros(1, 1, 3, 5)


def test_losses_and_gradients_equal_the_released_ones(released: Numbers) -> None:
    out = released["train.model_out"].clone().requires_grad_()
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        seen.append((x, t))
        return out

    losses = IDDPM().training_losses(model, released["train.x0"], released["train.t"], released["train.noise"], Y, None)
    assert torch.equal(seen[0][0], released["train.x_t"])
    assert torch.equal(seen[0][1], released["train.model_saw_t"].float())
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(losses[name].detach(), released[f"train.{name}"], rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses["loss"].mean(), out)
    torch.testing.assert_close(gradient, released["train.grad_model_out"], rtol=1e-5, atol=1e-9)


def test_the_bound_trains_the_variance_alone(released: Numbers) -> None:
    out = released["train.model_out"].clone().requires_grad_()
    arguments = released["train.x0"], released["train.t"], released["train.noise"], Y, None
    (gradient,) = torch.autograd.grad(IDDPM().training_losses(lambda *_: out, *arguments)["vb"].sum(), out)
    assert gradient[:, :4].abs().max() == 0
    assert gradient[:, 4:].abs().max() > 0


def test_single_steps_equal_the_released_ones(released: Numbers) -> None:
    table, index, x = tables(100, CPU), released["step.t"], released["step.x"]
    noise = released["step.noise"] * (index != 0)[:, None, None, None, None]

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert torch.equal(t, released["step.model_saw_t"].float())
        return released["step.model_out"]

    torch.testing.assert_close(ancestral_step(table, predict, x, index, noise), released["step.p_sample"])
    for eta in (0.0, 0.5):
        made = ddim_step(table, predict, x, index, noise, eta)
        torch.testing.assert_close(made, released[f"step.ddim_eta{eta:g}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 6])
def test_a_whole_trajectory_equals_the_released_one(
    released: Numbers, released_inputs: Numbers, released_model: STDiT, rows: int
) -> None:
    """The released loop draws noise for both halves of the batch; the first half is what counts."""
    out = IDDPM(num_sampling_steps=5).sample(
        released_model,
        released["loop.z"],
        released_inputs["in.y"],
        released_inputs["cfg.null_y"],
        released_inputs["in.mask"],
        guidance_scale=7.0,
        guidance_mode="v1",
        step_noise=released["loop.step_noise"][:, :rows],  # type: ignore[arg-type]
    )
    expected = released["loop.iddpm5_cfg7"]
    assert (out - expected).norm() < 1e-4 * expected.norm()


def knows(x0: torch.Tensor):  # type: ignore[no-untyped-def]
    """A model that knows the data, and sees only timesteps that the process visits."""

    def model(x: torch.Tensor, t: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        assert t.dtype == torch.float32
        alpha = tables(1000, CPU).alphas_cumprod[t.long()].float()[:, None, None, None, None]
        noise = (x.float() - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1).to(x.dtype)

    return model


@pytest.mark.parametrize("steps", [2, 7, 100])
@pytest.mark.parametrize("sampler", [IDDPM, DDIM, lambda steps: DDIM(steps, eta=1.0)])
def test_sampling_reaches_the_data_of_a_model_that_knows_it(sampler, steps: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x0 = torch.rand(2, 4, 2, 3, 3) * 2 - 1
    out = sampler(steps).sample(knows(x0), torch.randn(2, 4, 2, 3, 3), Y, NULL, guidance_scale=1.0)
    torch.testing.assert_close(out, x0, atol=2e-3, rtol=2e-3)


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_lower_variance() -> None:
    torch.manual_seed(0)
    x, noise, index = torch.randn(3, 4, 1, 2, 2), torch.randn(3, 4, 1, 2, 2), torch.tensor([1, 40, 99])
    out = torch.cat([torch.randn(3, 4, 1, 2, 2), torch.full((3, 4, 1, 2, 2), -1.0)], dim=1)  # −1: log β̃
    table = tables(100, CPU)
    ancestral = ancestral_step(table, lambda *_: out, x, index, noise)
    torch.testing.assert_close(ddim_step(table, lambda *_: out, x, index, noise, 1.0), ancestral, rtol=1e-4, atol=1e-4)


def test_the_model_sees_kept_timesteps_in_float32_whatever_its_type() -> None:
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        assert x.dtype == torch.bfloat16
        seen.append(t)
        return torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=torch.bfloat16)

    z = torch.randn(2, 4, 1, 2, 2).bfloat16()
    for sampler in (IDDPM(9), DDIM(9)):
        seen.clear()
        assert sampler.sample(model, z, Y, NULL).dtype == torch.bfloat16
        assert [t.tolist() for t in seen] == [[t] * 4 for t in reversed(kept_timesteps(9))]
        assert {t.dtype for t in seen} == {torch.float32}


def test_float64_and_float32_agree() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, dtype=torch.float64) * 0.3

    def model(x: torch.Tensor, t: torch.Tensor, y: object, mask: object) -> torch.Tensor:
        return torch.einsum("oc,bcthw->bothw", weight.to(x.dtype), x).tanh()

    z = torch.randn(2, 4, 1, 3, 3)
    noise = torch.randn(20, 2, 4, 1, 3, 3)
    for sampler in (IDDPM(20), DDIM(20)):
        low = sampler.sample(model, z, Y, NULL, guidance_scale=2.0, step_noise=noise)  # type: ignore[arg-type]
        high = sampler.sample(model, z.double(), Y, NULL, guidance_scale=2.0, step_noise=noise)  # type: ignore[arg-type]
        assert high.dtype == torch.float64
        assert (low - high).norm() < 1e-4 * high.norm()
    t = torch.tensor([0, 700])
    x0, draw = z.clamp(-1, 1), torch.randn(2, 4, 1, 3, 3)
    losses = [
        IDDPM().training_losses(model, x0.to(dtype), t, draw.to(dtype), Y, None)["loss"]
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=1e-5)


def test_drawn_noise_is_replaced_step_by_step() -> None:
    asked: list[int] = []

    class Draws:
        def __getitem__(self, number: int) -> torch.Tensor:
            asked.append(number)
            return torch.zeros(2, 4, 1, 2, 2)

    z = torch.randn(2, 4, 1, 2, 2)
    quiet = [
        IDDPM(4).sample(lambda x, *_: torch.zeros(len(x), 8, 1, 2, 2), z, Y, NULL, step_noise=Draws()) for _ in range(2)
    ]
    assert torch.equal(*quiet)
    assert asked == [0, 1, 2] * 2  # the last step adds none


def test_timesteps_are_uniform_and_reproducible() -> None:
    drawn = IDDPM().sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert (drawn.min(), drawn.max()) == (0, 999)
    assert abs(drawn.float().mean() - 499.5) < 10
    assert torch.equal(drawn, IDDPM().sample_timesteps(20_000, torch.Generator().manual_seed(0)))


def test_a_model_without_variances_is_told_what_samples_it() -> None:
    z = torch.randn(2, 4, 1, 2, 2)
    with pytest.raises(ValueError, match="DDIM and DPM-Solver do without"):
        IDDPM(3).sample(lambda x, *_: x, z, Y, NULL)
    assert DDIM(3).sample(lambda x, *_: x, z, Y, NULL).shape == z.shape
