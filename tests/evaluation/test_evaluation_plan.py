"""What decides the numbers of an evaluation, and what does not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.evaluation.plan import make_plan
from opensora.evaluation.reference import Reference, Shape
from opensora.training.checkpoint import CheckpointError, describe_checkpoint
from tests.conftest import ROOT
from tests.metrics.vbench_environment import build_environment

REFERENCE = Reference(Shape(4, 32, 32, 1), (), None, "key")
CONFIG = load_config(ROOT / "params.yaml", "smoke").evaluate


def identity(tmp_path: Path, weights: dict[str, Path] | None = None, **values: object) -> str:
    plan = make_plan(CONFIG.model_copy(update=values), None, dict(weights or {}), tmp_path / "cache")
    return plan.identity(REFERENCE)


def test_weights_count_wherever_they_lie(tmp_path: Path) -> None:
    one, two = tmp_path / "clip", tmp_path / "clip-vit-b"
    one.mkdir()
    (one / "model.safetensors").write_bytes(b"weights")
    shutil.copytree(one, two)
    first = identity(tmp_path, {"clip": one}, clip="clip")
    assert identity(tmp_path, {"clip": two}, clip="clip-vit-b", processes=4, batch_size=3) == first
    assert identity(tmp_path) != first
    (two / "model.safetensors").write_bytes(b"others")
    assert identity(tmp_path, {"clip": two}, clip="clip-vit-b") != first


def test_vbench_counts_by_its_version(tmp_path: Path) -> None:
    versions = {"a": "0.1.4", "b": "0.1.5", "c": "0.1.5"}
    pythons = {name: build_environment(tmp_path / name, "", version) for name, version in versions.items()}
    a, b, c = (identity(tmp_path, vbench=python) for python in pythons.values())
    assert a != b == c
    without = identity(tmp_path)
    assert without not in (a, b)
    assert identity(tmp_path, vbench=str(tmp_path / "absent")) == without  # it measures nothing


def test_clips_are_kept_by_what_makes_them(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(checkpoint.parents[2], tmp_path / "smoke")
    copied = describe_checkpoint(tmp_path / "smoke" / checkpoint.relative_to(checkpoint.parents[2]))
    plan = make_plan(CONFIG, None, {}, tmp_path / "cache")

    def folder(**values: object) -> Path:
        return replace(plan, config=CONFIG.model_copy(update=values)).clips(copied)

    first = folder()
    assert first == folder(reference_clips=7, batch_size=1, seed=3, prompts=("a cat",), clip="clip")
    others = {
        folder(steps=3),
        folder(guidance=2.0),
        folder(fps=9),
        replace(plan, extractors={"clip": "x"}).clips(copied),
    }
    assert len(others | {first}) == 5
    (copied.vae / "README.md").write_text("a note")
    assert folder() == first
    with monkeypatch.context() as patch:
        patch.setattr("opensora.evaluation.plan.hash_code", lambda: "other code")
        assert folder() not in others | {first}
    vae = copied.vae / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1])
    assert folder() not in others | {first}
    shutil.rmtree(copied.vae)
    with pytest.raises(CheckpointError):
        folder()
