"""The look for weights before a run: all that its steps will read, none that they will not, and how to bring them."""

import json
from pathlib import Path

import pytest

from opensora.chain import ALL_STEPS, check_weights, weights_of
from opensora.config import load_config
from opensora.weights import WeightsError
from tests.conftest import ROOT

pytest.importorskip("kfp", reason="the extra `kubeflow` is not installed")
STEPS = ["download", "split", "score", "caption", "encode", "train_image", "train_video", "train_highres", "evaluate"]


def model(folder: Path, *files: str, weights: str = "model.safetensors") -> None:
    """The files of a small model, whole."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / weights).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def look(capsys: pytest.CaptureFixture[str], steps: list[str], profile: str, *overrides: str) -> tuple[str, str]:
    """What the component prints, and its last line if it fails."""
    from components import data

    try:
        data.check_weights.python_func(profile, list(overrides), "/nowhere", "abc", steps)
    except SystemExit:
        return "", capsys.readouterr().err.strip().splitlines()[-1]
    return capsys.readouterr().out, ""


def test_all_that_is_missing_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    weights = tmp_path / "volume" / "weights"
    there = f"weights_dir={weights}"
    _, reason = look(capsys, STEPS, "h800", there, "offline=false")  # pods that read weights have no way to a hub
    assert reason.startswith("error: profile h800 lacks weights: llava (for caption), vae (for encode, evaluate), ")
    for text in (
        "t5 (for encode, evaluate), PixArt-XL-2-512x512.pth (for train_image), ",
        f", neither in {tmp_path} nor in {weights}; ",
        f"bring them: tar cf - -C weights . | kubectl -n opensora exec -i deploy/weights -- tar xf - -C {weights} (doc",
    ):
        assert text in reason

    model(weights / "vae", "config.json", weights="diffusion_pytorch_model.safetensors")
    model(weights / "t5", "config.json")
    _, reason = look(capsys, ["encode"], "h800", there)
    lacking = f"{weights}/t5 lacks tokenizer.json or spiece.model or vocab.json (for encode)"
    assert reason.startswith(f"error: profile h800 lacks weights: {lacking}; bring them: ")
    (weights / "t5" / "spiece.model").touch()
    out, reason = look(capsys, ["encode", "train_video"], "h800", there)
    assert not reason
    assert out.splitlines() == [f"vae (for encode): {weights}/vae", f"t5 (for encode): {weights}/t5"]


def test_models_of_their_own_need_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    for profile in ("smoke", "demo"):
        out, reason = look(capsys, [*ALL_STEPS], profile)
        assert (out.strip(), reason) == (f"profile {profile} reads no weights but its own: nothing to look for", "")


def test_what_a_step_reads_follows_the_profile() -> None:
    def names(step: str, *overrides: str) -> set[str]:
        return set(weights_of(step, load_config(ROOT / "params.yaml", "single_gpu", overrides)))

    assert names("download") == names("promote") == names("train_highres") == set()
    assert names("caption") == {"llava"}
    assert names("caption", "caption.backend=endpoint", "caption.endpoint=http://server/v1") == set()
    assert names("score", "score.clip=clip", "score.aesthetic_head=head.pth") == {"clip", "head.pth"}
    assert names("split", "split.detector=transnetv2", "split.transnetv2_file=cuts.onnx") == {"cuts.onnx"}
    assert names("train_video", "train_video.data=clips") == names("encode") == {"vae", "t5"}
    assert names("evaluate", "evaluate.videomae=videomae") == {"vae", "t5", "videomae"}


def test_a_hub_may_hold_them_where_downloads_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "params.yaml", "single_gpu", ("offline=false",))
    assert check_weights(config, STEPS) == []
    with pytest.raises(
        WeightsError, match=r"lacks weights: llava .*; put the model there, or allow downloads with --set offline=false"
    ):
        check_weights(config.model_copy(update={"offline": True}), STEPS)
