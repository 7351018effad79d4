"""The registry says what is missing, or was changed under it."""

import json
from pathlib import Path

import pytest

from opensora.tracking.registry import RegistryError, model_version_path, register, set_champion


def test_registry_names_what_is_missing_or_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "runs"
    root.mkdir()
    with pytest.raises(RegistryError, match="not in the registry"):
        model_version_path("models:/nothing@champion", root)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"sha256": "new"}))
    tags = {"checkpoint.uri": str(tmp_path), "checkpoint.sha256": "old"}
    version = register(root, "m", tmp_path, tags)
    set_champion(root, "m", version)
    with pytest.raises(RegistryError, match="another sha256"):
        model_version_path("models:/m@champion", root)
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(RegistryError, match="no checkpoint any more"):
        model_version_path(f"models:/m/{version}", root)
