"""The registry's champion as an evaluation finds it."""

import json
import shutil
from pathlib import Path

import pytest

from opensora.evaluation.champion import find_champion
from opensora.evaluation.files import hash_evaluation
from opensora.step import write_json
from opensora.tracking.registry import move_champion, register
from opensora.training.checkpoint import read_info


def test_numbers_that_somebody_changed_are_measured_anew(
    tmp_path: Path, checkpoint: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept evaluation counts as long as its hash is the recorded one, and else the champion generates."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_store, tmp_path)
    kept = tmp_path / "evaluation"
    kept.mkdir()
    for name in ("metrics.json", "scores.json"):
        write_json(kept / name, {"flicker": 0.9})
    tags = {"checkpoint.uri": str(checkpoint), "checkpoint.sha256": read_info(checkpoint, verify=False)["sha256"]}
    tags |= {"evaluation.uri": str(kept), "evaluation.files_sha256": hash_evaluation(kept)}
    move_champion(tmp_path, "m", register(tmp_path, "m", checkpoint, tags), None)

    def find_kept() -> Path | None:
        found = find_champion(tmp_path, "m", tmp_path)
        assert found
        assert found.checkpoint
        return found.kept

    assert find_kept() == kept
    for name in ("metrics.json", "scores.json"):
        original = (kept / name).read_bytes()
        write_json(kept / name, json.loads(original) | {"flicker": 0.0123})
        assert find_kept() is None
        (kept / name).unlink()
        assert find_kept() is None
        (kept / name).write_bytes(original)
        assert find_kept() == kept


def test_a_password_of_the_store_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said here stands in metrics.json, the gallery and a version's tags."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://eva:hunter2@127.0.0.1:9")
    found = find_champion(tmp_path, "m", tmp_path)
    assert found
    assert "http://***@127.0.0.1:9 cannot be asked" in found.unavailable
    assert "hunter2" not in found.unavailable
