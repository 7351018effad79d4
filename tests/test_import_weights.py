"""From a released file to an mp4 by the three commands, and every way in which a file can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from opensora.cli import app
from opensora.clip_file import read_note
from opensora.config import ConfigError, load_config
from opensora.data.video import read_frames
from opensora.import_weights import import_weights, inspect, summarise
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.training.checkpoint import describe_checkpoint, load_checkpoint
from opensora.weights import WeightsError
from tests.conftest import ROOT

HEADS = {"model": {"num_heads": 4}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, text_encoder: Path) -> Path:
    """A folder as a user has it: `vae` of eight pixels a latent, `t5`, a released Open-Sora and a PixArt."""
    import shutil

    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("released") / "weights"
    shutil.copytree(text_encoder, folder / "t5")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    config = STDiTConfig(
        (4, 8, 8), hidden_size=64, depth=2, num_heads=4, caption_channels=64, model_max_length=12, space_scale=0.5
    )
    model = STDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = model.state_dict()
    torch.save({"ema": state}, folder / "OpenSora-v1.pth")
    image = {name: value for name, value in state.items() if "temp" not in name}
    image["x_embedder.proj.weight"] = image["x_embedder.proj.weight"].squeeze(2)
    torch.save({"state_dict": image}, folder / "PixArt.pth")
    return folder


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_three_commands_lead_from_files_to_an_mp4(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    seen = command("weights", "inspect", weights / "OpenSora-v1.pth")
    for text in ('STDiT of Open-Sora 1.0, under the key "ema"', "hidden_size 64", "64×64 pixels", "space_scale 0.5"):
        assert text in seen
    arguments = ("--set", "model.num_heads=4", "--set", f"weights_dir={weights}")
    out = command("weights", "import", weights / "OpenSora-v1.pth", *arguments)
    assert "0 new, 0 left out" in out
    line = command(
        "generate",
        *("--checkpoint", weights / "OpenSora-v1", "--prompt", "a red circle moving left", "--steps", 3),
        *("--text-cache", tmp_path / "text", "--out", tmp_path / "out"),
    ).splitlines()[-1]
    assert read_frames(Path(line).read_bytes()).shape == (4, 64, 64, 3)
    note = json.loads(read_note(Path(line)))
    checkpoint = describe_checkpoint(weights / "OpenSora-v1")
    assert note["checkpoint"] == checkpoint.sha256
    assert (note["sampler"], note["guidance"], note["guidance_mode"]) == ("iddpm", 7.0, "v1")
    assert checkpoint.info["imported"]["of"] == "STDiT of Open-Sora 1.0"
    with torch.no_grad():
        theirs = torch.load(weights / "OpenSora-v1.pth", weights_only=True)["ema"]
        ours = load_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_imported_pixart_is_an_image_model_and_starts_a_stage(weights: Path, tmp_path: Path) -> None:
    from opensora.training.worker import build_model

    base = load_config(ROOT / "params.yaml", "h800", (f"weights_dir={weights}",))
    folder, report, config, stage = import_weights(weights / "PixArt.pth", tmp_path / "p", base, HEADS)
    assert (stage, config.train_image.frames, config.train_image.height) == ("train_image", 1, 64)
    assert summarise(report.initial).startswith("blocks.*.attn_temp.qkv.weight (2)")
    assert load_checkpoint(folder).blocks[0].attn_temp.proj.weight.abs().max() == 0

    values = config.model_copy(
        update={"train_video": config.train_video.model_copy(update={"init_from": "PixArt.pth", "frames": 4})}
    )
    model = build_model(values, "train_video", 32, None)
    expected = torch.load(weights / "PixArt.pth", weights_only=True)["state_dict"]
    assert torch.equal(model.blocks[1].mlp.fc1.weight, expected["blocks.1.mlp.fc1.weight"])


def test_a_missing_start_is_named(weights: Path) -> None:
    from opensora.training.worker import build_model

    config = load_config(ROOT / "params.yaml", "smoke", ("train_image.init_from=none.pth", f"weights_dir={weights}"))
    with pytest.raises(WeightsError, match=r"no weights 'none\.pth'"):
        build_model(config, "train_image", 8, None)


def test_what_the_file_does_not_tell_must_be_said(weights: Path, tmp_path: Path) -> None:
    base = load_config(ROOT / "params.yaml", "h800")
    with pytest.raises(ConfigError, match=r"width of 64.*--set model\.num_heads=N"):
        import_weights(weights / "OpenSora-v1.pth", tmp_path / "o", base, {})
    assert "num_heads is not told" in inspect(weights / "OpenSora-v1.pth")
    with pytest.raises(WeightsError, match=r"mlp\.fc1\.weight is \[256, 64\], expected \[128, 64\]"):
        import_weights(weights / "OpenSora-v1.pth", tmp_path / "o", base, {"model": {"num_heads": 4, "mlp_ratio": 2.0}})
    assert not (tmp_path / "o").exists()


def test_what_does_not_fit_is_named_unless_allowed(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights / "OpenSora-v1.pth", weights_only=True)["ema"]
    del state["blocks.1.attn.proj.bias"]
    state["blocks.0.lora"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pth")
    text = inspect(tmp_path / "odd.pth")
    assert "missing blocks.1.attn.proj.bias; unexpected blocks.0.lora" in text
    base = load_config(ROOT / "params.yaml", "h800")
    with pytest.raises(WeightsError, match=r"odd\.pth.*missing blocks\.1\.attn\.proj\.bias$"):
        import_weights(tmp_path / "odd.pth", tmp_path / "o", base, HEADS, ("*.lora",))
    _, report, _, _ = import_weights(tmp_path / "odd.pth", tmp_path / "o", base, HEADS, ("*.lora", "*.proj.bias"))
    assert (report.initial, report.ignored) == (["blocks.1.attn.proj.bias"], ["blocks.0.lora"])


def test_a_dit_is_for_comparison(tmp_path: Path) -> None:
    from opensora.models.dit import DiT

    model = DiT(STDiTConfig((1, 4, 4), hidden_size=32, depth=1, num_heads=4), num_classes=3)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    assert "all 21 tensors have their place" in inspect(tmp_path / "dit.pt")
    with pytest.raises(ConfigError, match="no text attention"):
        import_weights(tmp_path / "dit.pt", tmp_path / "o", load_config(ROOT / "params.yaml", "h800"), HEADS)
