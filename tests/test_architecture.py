"""Who may import whom: the layers hold, and heavy libraries stay where they belong."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "opensora"
LEAVES = {"config", "gpus", "manifest", "weights", "clip_model", "step", "progress", "process", "page"}
# What the modules of a package may import from others, as the first one or two parts of the name.
ALLOWED = {
    "models": LEAVES,
    "diffusion": LEAVES,
    "metrics": LEAVES,
    "data": LEAVES,
    "parallel": {"models", "config"},
    "training": LEAVES
    | {"models", "diffusion", "parallel", "tracking", "launch", "clip_file", "plan", "gpus"}
    | {"data.buckets", "data.clip_dataset", "data.dataset", "data.loader"},
    "tracking": LEAVES,
    "evaluation": LEAVES | {"data", "demo", "metrics", "generate", "tracking", "training.checkpoint", "clip_file"},
    "promotion": LEAVES | {"data.video", "evaluation", "served_model", "tracking", "training.checkpoint"},
    "demo": LEAVES | {"data.shards", "data.video"},
}
ONLY_IN = {
    "mlflow": {
        *("tracking/store.py", "tracking/sender.py", "tracking/registry.py", "tracking/version_files.py"),
        "served_model.py",
    },
    "kfp": set(),
    "colossalai": {"parallel/colossal_engine.py"},
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> set[str]:
    """Full names of all that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    return {name.removeprefix("opensora.") for name in imports(path) if name.startswith("opensora.")}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    package = relative.parts[0] if len(relative.parts) > 1 else None
    used = own_imports(path)
    if package is None and relative.stem in LEAVES:
        assert used <= {"config", "weights"}
    elif package is not None:
        allowed = set(ALLOWED[package])
        if str(relative) == "data/encode.py":
            allowed.add("models")
        outside = {
            name for name in used if name.split(".")[0] != package and not ({name, name.split(".")[0]} & allowed)
        }
        assert not outside
    foreign = {name.split(".")[0] for name in imports(path)}
    for library, places in ONLY_IN.items():
        assert library not in foreign or str(relative) in places


def test_the_wheel_packages_opensora_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["opensora*"]
