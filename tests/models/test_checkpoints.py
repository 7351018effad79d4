"""Released weights become ours: PixArt-α in both forms, Open-Sora 1.0, DiT; what does not fit is named."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora.models.checkpoints import guess_model, guess_size, load_released, read_released
from opensora.models.dit import DiT
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.weights import WeightsError
from tests.shared import shared

Numbers = dict[str, torch.Tensor]
SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 4, "caption_channels": 16, "model_max_length": 6}


def config(frames: int = 4, side: int = 8, **changes: object) -> STDiTConfig:
    return STDiTConfig(input_size=(frames, side, side), **{**SMALL, **changes})  # type: ignore[arg-type]


def filled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with no zero weights, which would hide mistakes."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pixart_form(model: STDiT) -> Numbers:
    """The state that an image model of PixArt-α's code has."""
    state = {name: value.detach() for name, value in model.state_dict().items() if "temp" not in name}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    return state


def inputs(frames: int, side: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    return torch.randn(2, 4, frames, side, side), torch.tensor([20.0, 981.0]), torch.randn(2, 1, 6, 16), mask


@pytest.fixture(scope="module")
def loader() -> Numbers:
    return load_file(shared("fixtures/fixture_loader.safetensors"))


def test_a_released_pixart_becomes_the_state_and_output_that_the_original_loader_made(
    loader: Numbers, tmp_path: Path
) -> None:
    settings = json.loads(shared("fixtures/fixture_loader.json").read_text())["stdit_config"]
    torch.save({"state_dict": {n[7:]: v for n, v in loader.items() if n.startswith("pixart.")}}, tmp_path / "p.pth")
    released = read_released(tmp_path / "p.pth")
    assert (released.family, released.wrapper) == ("pixart", "state_dict")
    model = STDiT(STDiTConfig(**{**settings, "input_size": tuple(settings["input_size"])})).eval()
    report = load_released(model, released)
    new = [f"blocks.{i}.attn_temp.{n}.{p}" for i in range(2) for n in ("qkv", "proj") for p in ("weight", "bias")]
    assert (sorted(report.initial), report.ignored) == (sorted(new), [])
    expected = {name[6:]: value for name, value in loader.items() if name.startswith("stdit.")}
    state = model.state_dict()
    assert set(state) == set(expected)
    for name in set(expected) - {n for n in new if "qkv.weight" in n}:  # drawn at random by both
        torch.testing.assert_close(state[name], expected[name], atol=1e-6, rtol=0, msg=name)
    out = model(loader["x"], loader["t"], loader["y"], loader["mask"])
    assert (out - loader["out"]).norm() < 2e-6 * loader["out"].norm()


def test_a_loaded_stdit_equals_pixart_frame_by_frame_exactly(tmp_path: Path) -> None:
    torch.save({"state_dict": pixart_form(filled(STDiT(config(frames=1))))}, tmp_path / "p.pth")  # type: ignore[arg-type]
    released = read_released(tmp_path / "p.pth")
    video, image = STDiT(config(frames=5)).eval(), STDiT(config(frames=1)).eval()
    load_released(video, released)
    load_released(image, released)
    x, t, y, mask = inputs(5)
    whole = video(x, t, y, mask)
    for frame in range(5):
        assert torch.equal(whole[:, :, frame : frame + 1], image(x[:, :, frame : frame + 1], t, y, mask))


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "pixart" / "transformer")
    return tmp_path / "pixart"


def test_diffusers_pixart_gives_the_same_output(diffusers_folder: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel.from_pretrained(diffusers_folder / "transformer").eval()
    released = read_released(diffusers_folder)
    assert guess_size(released) == {"rows": 8, "columns": 8, "space_scale": 1.0, "frames": 1}
    model = STDiT(config(frames=1, side=16, **guess_model(released))).eval()  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"missing y_embedder.y_embedding;.*null text"):
        load_released(model, released)
    load_released(model, released, allow_missing=("y_embedder.y_embedding",))
    x, t, y, mask = inputs(1, side=16)
    out = model(x, t, y, mask)
    expected = theirs(x[:, :, 0], y[:, 0], t, encoder_attention_mask=mask, added_cond_kwargs={}).sample
    torch.testing.assert_close(out[:, :, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrapper", [None, "ema"])
def test_open_sora_loads_plain_and_wrapped_at_another_size(tmp_path: Path, wrapper: str | None) -> None:
    trained = filled(STDiT(config(frames=4, side=8, space_scale=0.5)))
    state = OrderedDict(trained.state_dict())
    torch.save(state if wrapper is None else {wrapper: state, "step": 7}, tmp_path / "o.pth")
    released = read_released(tmp_path / "o.pth")
    assert (released.family, released.wrapper) == ("stdit", wrapper or "")
    assert guess_size(released) == {"rows": 4, "columns": 4, "space_scale": 0.5, "frames": 4, "time_scale": 1.0}
    assert {**SMALL, **guess_model(released)} == {
        **SMALL,
        "mlp_ratio": 4.0,
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "pred_sigma": True,
    }
    model = STDiT(config(frames=9, side=16, space_scale=0.5)).eval()
    report = load_released(model, released)
    assert (report.initial, report.ignored) == ([], [])
    for size in ((4, 8), (9, 16)):
        assert torch.equal(model(*inputs(*size)), trained(*inputs(*size)))


@pytest.mark.parametrize("frames_scale", [1.0, 2 / 3])
def test_scales_are_read_from_the_stored_tables(tmp_path: Path, frames_scale: float) -> None:
    torch.save(
        STDiT(config(frames=8, side=16, space_scale=2.0, time_scale=frames_scale)).state_dict(), tmp_path / "s.pt"
    )
    size = guess_size(read_released(tmp_path / "s.pt"))
    assert (size["space_scale"], size["time_scale"]) == (2.0, frames_scale)


def test_dit_with_classes_loads_and_an_stdit_cannot_hold_it(tmp_path: Path) -> None:
    trained = filled(DiT(config(frames=1, model_max_length=1), num_classes=5))
    state = {n.replace("pos_embed_spatial", "pos_embed"): v for n, v in trained.state_dict().items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    del state["pos_embed_temporal"]
    torch.save(state, tmp_path / "DiT-XL-2-256x256.pt")
    released = read_released(tmp_path / "DiT-XL-2-256x256.pt")
    assert released.family == "dit"
    model = DiT(config(frames=1, model_max_length=1), num_classes=5).eval()
    load_released(model, released)
    x, t, _, _ = inputs(1)
    assert torch.equal(model(x, t, torch.tensor([1, 5])), trained(x, t, torch.tensor([1, 5])))
    with pytest.raises(WeightsError, match=r"missing t_block\.1\.weight.*unexpected .*adaLN_modulation"):
        load_released(STDiT(config(frames=1)), released)


def test_latte_loads_from_its_average(tmp_path: Path) -> None:
    trained = filled(DiT(config(model_max_length=1), num_classes=5))
    renames = {"pos_embed_spatial": "pos_embed", "pos_embed_temporal": "temp_embed"}
    state = {renames.get(name, name): value for name, value in trained.state_dict().items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    raw = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": raw, "ema": state}, tmp_path / "latte.pt")
    released = read_released(tmp_path / "latte.pt")
    assert released.wrapper == "ema"
    model = DiT(config(model_max_length=1), num_classes=5).eval()
    load_released(model, released)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


def test_everything_that_does_not_fit_is_named_unless_allowed(tmp_path: Path) -> None:
    state = dict(filled(STDiT(config())).state_dict())
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.0.extra"] = torch.zeros(2)
    state["final_layer.linear.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "s.pth")
    released = read_released(tmp_path / "s.pth")
    model = STDiT(config())
    with pytest.raises(WeightsError) as error:
        load_released(model, released)
    for text in (
        "s.pth",
        "missing blocks.1.mlp.fc1.bias",
        "unexpected blocks.0.extra",
        "final_layer.linear.bias is [3], expected [32]",
    ):
        assert text in str(error.value)
    before = model.final_layer.linear.bias.clone()
    report = load_released(model, released, allow_missing=("blocks.*.fc1.bias", "*.extra", "final_layer.*"))
    assert report.initial == ["blocks.1.mlp.fc1.bias", "final_layer.linear.bias"]
    assert sorted(report.ignored) == ["blocks.0.extra", "final_layer.linear.bias"]
    assert torch.equal(model.final_layer.linear.bias, before)


def test_pixart_may_lack_temporal_attention_and_nothing_else(tmp_path: Path) -> None:
    state = pixart_form(filled(STDiT(config(frames=1))))  # type: ignore[arg-type]
    del state["blocks.1.cross_attn.proj.weight"]
    torch.save({"state_dict": state}, tmp_path / "p.pth")
    with pytest.raises(WeightsError) as error:
        load_released(STDiT(config()), read_released(tmp_path / "p.pth"))
    assert "missing blocks.1.cross_attn.proj.weight" in str(error.value)
    assert "attn_temp" not in str(error.value)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("old_form", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, old_form: bool) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "args": Evil(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not old_form)
    with pytest.raises(WeightsError, match="holds more than tensors"):
        read_released(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["s.pth", "s.safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    from safetensors.torch import save_file

    state = STDiT(config()).state_dict()
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match="is damaged"):
        read_released(tmp_path / name)


def test_foreign_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(WeightsError, match=r"no model that is known here.*it holds weight, bias"):
        read_released(tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        read_released(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="it holds nothing"):
        read_released(tmp_path / "empty.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match="expected diffusion_pytorch_model"):
        read_released(tmp_path / "folder")
    state = dict(STDiT(config()).state_dict())
    del state["final_layer.linear.weight"]
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(WeightsError, match=r"final_layer\.linear\.weight.*is it whole"):
        guess_model(read_released(tmp_path / "headless.pth"))


def test_diffusers_shards_are_read_by_their_index(diffusers_folder: Path) -> None:
    whole = read_released(diffusers_folder).tensors
    folder = diffusers_folder / "transformer"
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
    sharded = read_released(diffusers_folder).tensors
    assert set(sharded) == set(whole)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    next(folder.glob("*-00001-of-*")).unlink()
    with pytest.raises(WeightsError, match=r"no weights file at .*-00001-of-"):
        read_released(diffusers_folder)
