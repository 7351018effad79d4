"""What a run is made of: code, data, parameters."""

import os
import subprocess
from hashlib import md5
from pathlib import Path
from typing import Any

# Environment, of a pipeline on a cluster:
DATA_REVISION = "OPENSORA_DATA_REVISION"
CODE_REVISION = "OPENSORA_CODE_REVISION"  # commit; "-dirty" behind it says that files differed


def lineage() -> dict[str, str]:
    """Tags that say which code and data made a run: git commit and state, dvc.lock's md5 and those of its outs.

    A pipeline on a cluster has neither git nor dvc.lock; it names both revisions in the environment.
    """
    tags = {"data_revision": revision} if (revision := os.environ.get(DATA_REVISION)) else {}
    if code := os.environ.get(CODE_REVISION):
        return tags | {"git_commit": code.removesuffix("-dirty"), "git_dirty": str(code.endswith("-dirty")).lower()}
    try:
        for name, command in {
            "git_commit": "rev-parse HEAD",
            "git_dirty": "status --porcelain --untracked-files=no",
        }.items():
            out = subprocess.run(
                ["git", *command.split()], capture_output=True, text=True, check=True, timeout=20
            ).stdout
            tags[name] = out.strip() if name == "git_commit" else str(bool(out.strip())).lower()
    except (OSError, subprocess.SubprocessError):
        tags["git_commit"] = "unknown"
    lock = Path("dvc.lock")
    if lock.is_file():
        import yaml

        tags["dvc_lock_md5"] = md5(lock.read_bytes()).hexdigest()
        for stage in (yaml.safe_load(lock.read_text()) or {}).get("stages", {}).values():
            tags |= {f"dvc.{out['path']}.md5": out["md5"] for out in stage.get("outs", []) if "md5" in out}
    return tags


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}, as MLflow's params want it."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return flat
