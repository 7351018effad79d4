"""STDiT equals the released model: outputs, intermediates, gradients; and holds its own contracts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from opensora.models.attention import SelfAttention, TemporalAttention
from opensora.models.stdit import STDiT, STDiTConfig
from tests.shared import shared

ATOL = 1e-5


@pytest.fixture(scope="module")
def fixture() -> dict[str, torch.Tensor]:
    return load_file(shared("fixtures/fixture_a.safetensors"))


@pytest.fixture
def model(fixture: dict[str, torch.Tensor]) -> STDiT:
    config = json.loads(shared("fixtures/fixture_a.json").read_text())["config"]
    model = STDiT(STDiTConfig(**{**config, "input_size": tuple(config["input_size"])})).eval()
    state = {name[3:]: value for name, value in fixture.items() if name.startswith("sd.")}
    model.load_state_dict(state, strict=True)
    return model


def inputs(fixture: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return fixture["in.x"], fixture["in.timestep"], fixture["in.y"], fixture["in.mask"]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=ATOL)


def test_outputs_equal_the_released_model(model: STDiT, fixture: dict[str, torch.Tensor]) -> None:
    x, t, y, mask = inputs(fixture)
    close(model(x, t, y, mask), fixture["out"])
    close(model(x, t, y, None), fixture["out_nomask"])
    close(model(x, t, y, fixture["in.mask_scattered"]), fixture["out_mask_scattered"])
    close(model(x, fixture["in.timestep_float"], y, mask), fixture["out_timestep_float"])


def test_intermediates_equal_the_released_model(model: STDiT, fixture: dict[str, torch.Tensor]) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, of_input: bool = False):  # type: ignore[no-untyped-def]
        return lambda module, args, out: seen.__setitem__(name, args[0] if of_input else out)

    model.x_embedder.register_forward_hook(keep("x_embedder"))
    model.t_embedder.register_forward_hook(keep("t_emb"))
    model.t_block.register_forward_hook(keep("t0"))
    model.y_embedder.register_forward_hook(keep("y_emb"))
    model.blocks[0].register_forward_hook(keep("block0_in", of_input=True))
    model.blocks[0].attn.register_forward_hook(keep("block0.attn_out_BT_S_C"))
    model.blocks[0].attn_temp.register_forward_hook(keep("block0.attn_temp_in_BS_T_C", of_input=True))
    model.blocks[0].attn_temp.register_forward_hook(keep("block0.attn_temp_out_BS_T_C"))
    model.blocks[0].cross_attn.register_forward_hook(keep("block0.cross_out"))
    model.blocks[0].mlp.register_forward_hook(keep("block0.mlp_out"))
    for index in range(3):
        model.blocks[index].register_forward_hook(keep(f"block{index}_out"))
    model.final_layer.register_forward_hook(keep("final_layer"))
    model(*inputs(fixture))
    for name in ("block0.attn_temp_in_BS_T_C", "block0.attn_temp_out_BS_T_C"):  # ours is [B, T, S, C]
        seen[name] = seen[name].transpose(1, 2).flatten(0, 1)
    for name, value in seen.items():
        close(value, fixture[f"stage.{name}"])
    assert len(seen) == 14


def test_gradients_equal_the_released_model(model: STDiT, fixture: dict[str, torch.Tensor]) -> None:
    x, t, y, mask = inputs(fixture)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    out = model(x, t, y, mask)
    loss = (out * fixture["grad.w"]).mean() + out.square().mean()
    loss.backward()
    close(loss.detach(), fixture["grad.loss"].squeeze())
    gradients = {"in.x": x.grad, "in.y": y.grad}
    gradients |= {f"param.{name}": parameter.grad for name, parameter in model.named_parameters()}
    expected = [name[5:] for name in fixture if name.startswith(("grad.in.", "grad.param."))]
    assert len(expected) > 5
    for name in expected:
        close(gradients[name], fixture[f"grad.{name}"])


def test_dropped_caption_equals_the_released_model(model: STDiT, fixture: dict[str, torch.Tensor]) -> None:
    embedded = model.y_embedder(fixture["in.y"], drop=fixture["in.force_drop_ids"])
    close(embedded, fixture["y_embedder_forced_drop"])


def test_names_and_shapes_of_the_full_model() -> None:
    table = json.loads(shared("fixtures/param_tables.json").read_text())["STDiT-XL/2 16x256x256"]
    with torch.device("meta"):
        model = STDiT(STDiTConfig(input_size=(16, 32, 32), space_scale=0.5))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == table["parameters"] | table["buffers"]
    assert sum(parameter.numel() for parameter in model.parameters()) == table["n_params"]


def small(**changes: object) -> STDiT:
    torch.manual_seed(0)
    values = {"hidden_size": 32, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 6}
    model = STDiT(STDiTConfig(**{"input_size": (4, 8, 8), **values, **changes})).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model: STDiT, frames: int, height: int, width: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(batch, 4, frames, height, width)
    return model(x, torch.full((batch,), 300.0), torch.randn(batch, 1, 6, 16))


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 8, 8), (7, 4, 12), (3, 5, 7), (2, 1, 1)])
def test_any_size_of_video(size: tuple[int, int, int]) -> None:
    out = run(small(), *size)
    assert out.shape == (2, 8, *size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_position_tables_follow_the_input() -> None:
    default, other = small(), small(input_size=(2, 4, 4))
    other.load_state_dict({**default.state_dict(), **{k: v for k, v in other.state_dict().items() if "pos_" in k}})
    close(run(other, 4, 8, 8), run(default, 4, 8, 8))


def test_one_frame_fold_equals_attention() -> None:
    attention = small().blocks[0].attn_temp
    x = torch.randn(3, 1, 5, 32)
    doubled = attention(x.repeat(1, 2, 1, 1))[:, :1]  # two equal keys average to the same value
    close(attention(x), doubled)


@pytest.mark.parametrize("heads_at_once", [65_535, 7])
def test_temporal_attention_is_attention_along_time_at_each_location(
    monkeypatch: pytest.MonkeyPatch, heads_at_once: int
) -> None:
    monkeypatch.setattr("opensora.models.attention.MAX_HEADS", heads_at_once)
    attention, same = TemporalAttention(32, 4), SelfAttention(32, 4)
    same.load_state_dict(attention.state_dict())
    x = torch.randn(2, 6, 5, 32, requires_grad=True)
    expected = same(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2)
    weight = torch.randn(2, 6, 5, 32)
    close(attention(x), expected)
    (ours,) = torch.autograd.grad((attention(x) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), x)
    close(ours, theirs)


def test_frames_are_independent_when_temporal_attention_is_zero() -> None:
    model = small()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn_temp.proj.weight)
        torch.nn.init.zeros_(block.attn_temp.proj.bias)
    x, y, t = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 1, 6, 16), torch.tensor([10.0])
    whole = model(x, t, y)
    for frame in range(3):
        torch.testing.assert_close(whole[:, :, frame : frame + 1], model(x[:, :, frame : frame + 1], t, y))


def test_bf16_keeps_timesteps_apart() -> None:
    model = small().bfloat16()
    seen: list[torch.Tensor] = []
    model.t_embedder.mlp[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, y = torch.randn(2, 4, 1, 4, 4), torch.randn(2, 1, 6, 16)
    out = model(x, torch.tensor([997.0, 998.0]), y)
    assert not torch.equal(seen[0][0], seen[0][1])
    assert out.dtype == torch.float32


def test_new_model_starts_as_an_image_model_that_predicts_zero() -> None:
    model = STDiT(STDiTConfig(input_size=(2, 4, 4), hidden_size=32, depth=1, num_heads=2, caption_channels=16))
    assert model.blocks[0].attn_temp.proj.weight.abs().max() == 0
    assert run(model, 2, 4, 4).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x": (2, 3, 2, 4, 4)}, "x must be"), ({"t": (3,)}, "timestep must be"), ({"y": (2, 6, 16)}, "y must be")],
)
def test_bad_shapes_are_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (2, 4, 2, 4, 4), "t": (2,), "y": (2, 1, 6, 16), **change}
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shapes["x"]), torch.zeros(shapes["t"]), torch.zeros(shapes["y"]))


def test_mask_rows_are_tiled_and_wrong_counts_named() -> None:
    model = small()
    x, t, y = torch.randn(4, 4, 1, 4, 4), torch.zeros(4), torch.randn(4, 1, 6, 16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
    close(model(x, t, y, mask), model(x, t, y, mask.repeat(2, 1)))
    with pytest.raises(ValueError, match="3 rows"):
        model(x, t, y, torch.ones(3, 6))


@pytest.mark.parametrize(
    ("mask", "tokens", "masked"),
    [
        (None, 6, False),
        ([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]], 4, True),
        ([[1, 0, 1, 0, 0, 0]], 2, False),
        ([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], 6, True),
    ],
)
def test_encoded_text_gives_the_same_output_from_the_tokens_in_use(
    mask: list[list[int]] | None, tokens: int, masked: bool
) -> None:
    model = small()
    x, t, y = torch.randn(2, 4, 3, 4, 4), torch.tensor([5.0, 700.0]), torch.randn(2, 1, 6, 16)
    rows = None if mask is None else torch.tensor(mask)
    encoded = model.encode_text(y, rows)
    assert encoded.keys_values[0][0].shape[2] == tokens
    assert (encoded.keep is not None) == masked
    close(model(x, t, encoded), model(x, t, y, rows))


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 5, 7)])
def test_float32_equals_float64(size: tuple[int, int, int]) -> None:
    model, exact = small(), small().double()
    x, y = torch.randn(2, 4, *size), torch.randn(2, 1, 6, 16)
    outs = []
    for network in (model, exact):
        out = network(x, torch.tensor([3.0, 998.5]), y)
        out.square().mean().backward()
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None, name
        difference = (ours.grad - theirs.grad).norm()
        assert difference <= 1e-4 * theirs.grad.norm() + 1e-7, name


def test_bf16_stays_near_float32_because_timesteps_do(fixture: dict[str, torch.Tensor], model: STDiT) -> None:
    """The released model rounded timesteps to bf16, which made nearly all of its error of 0.125."""
    out = model.bfloat16()(*inputs(fixture))
    exact = fixture["out_f64run"]
    assert (out - exact).norm() < 0.02 * exact.norm()
    assert (fixture["out_bf16run"] - exact).norm() > 0.1 * exact.norm()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler (g++)")
def test_a_compiled_model_equals_the_eager_one() -> None:
    model = small(depth=1)
    compiled = torch.compile(model, fullgraph=True)
    # Small timesteps: compiled sines of hundreds of radians are rounded in another way.
    x, t, y = torch.randn(2, 4, 3, 4, 6), torch.tensor([1.0, 20.0]), torch.randn(2, 1, 6, 16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
    outs, gradients = [], []
    for network in (model, compiled):
        model.zero_grad()
        out = network(x, t, y, mask)
        out.square().mean().backward()
        outs.append(out.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
