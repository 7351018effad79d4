"""Guidance: which channels, in one batch, with the released numbers, and the text prepared once."""

import pytest
import torch

from opensora.diffusion.dpm_solver import DpmSolver
from opensora.diffusion.guidance import GuidanceMode, guided
from opensora.diffusion.iddpm import DDIM, IDDPM
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.attention import CrossAttention
from opensora.models.stdit import STDiT, STDiTConfig
from tests.diffusion.conftest import Numbers

Z = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Y, NULL = torch.ones(3, 1, 2, 5), torch.zeros(1, 1, 2, 5)


@pytest.mark.parametrize(("mode", "channels"), [("v1", 3), ("full", 4)])
def test_both_halves_run_in_one_batch(mode: GuidanceMode, channels: int) -> None:
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append((x.shape[0], t.tolist(), mask.shape[0]))
        return y.mean((1, 2, 3))[:, None, None, None, None].expand(-1, 8, *x.shape[2:]).clone()

    out = guided(model, Z, Y, NULL, torch.ones(3, 2), 5.0, mode)(Z, torch.tensor(7))
    assert calls == [(6, [7.0] * 6, 6)]
    assert out.shape == (3, 8, 2, 4, 4)
    assert (out[:, :channels] == 5.0).all()  # 0 + 5 · (1 − 0)
    assert (out[:, channels:] == 1.0).all()  # the conditional prediction


@pytest.mark.parametrize("scale", [4.0, 7.0])
def test_guided_predictions_equal_the_released_ones(
    released_inputs: Numbers, released_model: STDiT, scale: float
) -> None:
    text = released_inputs["in.y"], released_inputs["cfg.null_y"], released_inputs["in.mask"]
    x, t = released_inputs["in.x"], released_inputs["in.timestep"]
    out = guided(released_model, x, *text, scale, "v1")
    expected = released_inputs[f"cfg.guided_{scale:g}"].chunk(2)[0]
    made = torch.cat([out(x, t[0])[:1], out(x, t[1])[1:2], out(x, t[2])[2:]])  # a timestep a row
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_scale_1_is_one_conditional_pass() -> None:
    rows = []
    out = guided(lambda x, *_: rows.append(len(x)) or x, Z, Y, NULL, None, 1.0, "full")(Z, torch.tensor(1))
    assert rows == [3]
    assert torch.equal(out, Z)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="one of v1, full"):
        guided(lambda x, *_: x, Z, Y, NULL, None, 7.0, "v2")  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [IDDPM(4), DDIM(4), DpmSolver(4), RectifiedFlow(4)])
def test_text_is_prepared_once_a_prompt_and_changes_nothing(
    sampler: IDDPM | DDIM | DpmSolver | RectifiedFlow,
) -> None:
    torch.manual_seed(0)
    config = STDiTConfig((2, 4, 4), hidden_size=32, depth=3, num_heads=4, caption_channels=5, model_max_length=2)
    model = STDiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    calls: list[int] = []
    layers = [module.kv_linear for module in model.modules() if isinstance(module, CrossAttention)]
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    y, mask, noise = torch.randn(3, 1, 2, 5), torch.tensor([[1, 0], [1, 1], [1, 1]]), torch.zeros(4, *Z.shape)

    def sample(denoiser: object) -> torch.Tensor:
        calls.clear()
        return sampler.sample(denoiser, Z, y, NULL, mask, guidance_scale=3.0, step_noise=noise)  # type: ignore[arg-type]

    kept = sample(model)
    assert len(calls) == len(layers)
    plain = sample(lambda *inputs: model(*inputs))  # a callable without `encode_text`
    assert len(calls) == 4 * len(layers)
    assert (kept - plain).norm() <= 1e-5 * plain.norm()
