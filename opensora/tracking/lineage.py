"""What a run is made of: code, image, data, parameters."""

import json
import os
import subprocess
from hashlib import md5
from pathlib import Path
from typing import Any

from opensora.step import FINGERPRINT

# Environment of a pipeline on a cluster, which has neither git nor dvc.lock:
DATA_REVISION = "OPENSORA_DATA_REVISION"
CODE_REVISION = "OPENSORA_REVISION"  # git commit, "-dirty" behind it if files differed: of images and of pipelines
IMAGE = "OPENSORA_IMAGE"  # name of the image, with its digest where it was started by that
LOCK = "dvc.lock"
DIGEST_LENGTH = 36  # that the store takes


def lineage() -> dict[str, str]:
    """Tags that say which code, image and data made a run.

    git commit and whether files differ from it; dvc.lock's md5 and those of its outs; image and data revision as the
    environment names them.
    """
    tags = {"data_revision": revision} if (revision := os.environ.get(DATA_REVISION)) else {}
    tags |= _image() | _code()
    lock = Path(LOCK)
    if lock.is_file():
        tags["dvc_lock_md5"] = md5(lock.read_bytes()).hexdigest()
        tags |= {f"dvc.{path}.md5": value for path, value in _versioned(lock).items()}
    return tags


def data_digest(folder: Path) -> str:
    """The revision of a step's results, of at most 36 characters.

    Of dvc.lock if that holds the folder, else as the pipeline names it, else the fingerprint of what made it.
    """
    lock = Path(LOCK)
    if lock.is_file():
        for path, value in _versioned(lock).items():
            if Path(path).resolve() == folder.resolve():
                return value[:DIGEST_LENGTH]
    revision = os.environ.get(DATA_REVISION)
    if revision:
        return revision[:DIGEST_LENGTH]
    try:
        return str(json.loads((folder / FINGERPRINT).read_text()))[:DIGEST_LENGTH]
    except (OSError, ValueError):
        return "unknown"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}, as MLflow's params want it."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return flat


def _code() -> dict[str, str]:
    tags = {}
    if revision := os.environ.get(CODE_REVISION):
        tags["git_commit"] = revision.removesuffix("-dirty")
        dirty = str(revision.endswith("-dirty")).lower()
        return tags | {"git_dirty": dirty, "mlflow.source.git.commit": tags["git_commit"]}
    try:
        for name, command in {
            "git_commit": "rev-parse HEAD",
            "git_dirty": f"status --porcelain --untracked-files=no -- :/ :(exclude){LOCK}",  # which DVC writes itself
        }.items():
            out = subprocess.run(
                ["git", *command.split()], capture_output=True, text=True, check=True, timeout=20
            ).stdout
            tags[name] = out.strip() if name == "git_commit" else str(bool(out.strip())).lower()
    except (OSError, subprocess.SubprocessError):
        tags = {"git_commit": "unknown"}
    return tags | {"mlflow.source.git.commit": tags["git_commit"]}


def _image() -> dict[str, str]:
    image = os.environ.get(IMAGE, "")
    _, at, digest = image.partition("@")
    return ({"image": image} if image else {}) | ({"image_digest": digest} if at else {})


def _versioned(lock: Path) -> dict[str, str]:
    """md5 of every out in dvc.lock, by its path."""
    import yaml

    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}
