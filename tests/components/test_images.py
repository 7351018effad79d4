"""The images' recipe: who runs in them, what stays out of them, and that its lists are the project's own."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from components.image_names import IMAGES
from tests.conftest import ROOT

FOLDER = ROOT / "components" / "images"
PINNED_HERE = {"psycopg2-binary"}  # for MLflow's server alone; nothing in .venv needs PostgreSQL
FROM_OTHERS = {"mlflow-skinny", "boto3", "click", "packaging"}  # parts of what the project names


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"images_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stages() -> dict[str, list[str]]:
    """Instructions of each stage, continued lines joined."""
    text = (FOLDER / "Containerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            current = found.setdefault(match[2], [f"FROM {match[1]}"])
        elif line and not line.startswith("#"):
            current.append(line)
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_not_root_is_labelled_and_holds_no_stage_that_builds(image: str) -> None:
    name = image.rpartition("-")[2]
    lines = stages()[name]
    parent = lines[0].removeprefix("FROM ")
    assert parent == ("python-train" if name == "train" else "python")  # not a stage with pip in it
    assert not any(line.startswith("RUN") for line in lines)
    assert "USER 10001:10001" in lines
    label = next(line for line in lines if line.startswith("LABEL"))
    for key in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{key}=" in label
    assert f'title="{image}"' in label
    assert any(line.startswith("HEALTHCHECK") for line in lines) == (name == "evaluate")  # the one that serves


def test_compilers_are_for_training_alone() -> None:
    with_compiler = {name for name, lines in stages().items() if any("gcc" in line for line in lines)}
    assert with_compiler == {"python-train"}


def requirements(name: str) -> set[str]:
    found = set()
    for line in (FOLDER / "requirements" / f"{name}.txt").read_text().splitlines():
        if line.startswith("-r "):
            found |= requirements(line.removeprefix("-r ").removesuffix(".txt"))
        elif line and not line.startswith("#"):
            found.add(re.split(r"[\[=<>]", line)[0])
    return found


@pytest.mark.parametrize("name", ["data", "caption", "train", "evaluate"])
def test_packages_are_those_of_the_project_in_pinned_versions(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    own = {re.split(r"[\[=<>]", text)[0].lower() for text in named}
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for package in requirements(name) - PINNED_HERE:
        assert package in own | FROM_OTHERS
        assert package in pinned


def test_constraints_hold_for_the_oldest_python_of_the_images() -> None:
    """Debian 12 has 3.11.2; a package that asks for a newer 3.11 cannot be installed there."""
    from importlib.metadata import distributions

    from packaging.specifiers import SpecifierSet

    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for found in distributions():
        if found.metadata["Name"].lower() in pinned:
            assert "3.11.2" in SpecifierSet(found.metadata.get("Requires-Python") or ""), found.metadata["Name"]


def test_the_linter_has_nothing_to_say() -> None:
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not command:
        pytest.skip("hadolint is not installed beside this Python")
    done = subprocess.run([command, str(FOLDER / "Containerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_sbom_names_debians_packages_too() -> None:
    bom = script("sbom").add_debian({"components": []}, "openssl 3.0.20-1 amd64\nzlib1g 1:1.2 amd64\n")
    assert [part["purl"] for part in bom["components"]] == [
        "pkg:deb/debian/openssl@3.0.20-1?arch=amd64",
        "pkg:deb/debian/zlib1g@1:1.2?arch=amd64",
    ]


def test_pips_settings_reach_the_build_by_mounts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = script("build")
    index = tmp_path / "index" / "simple"
    index.mkdir(parents=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file://{index} https://example.org/simple")
    options = build.pip_settings(tmp_path)
    assert f"{index.parent}:/run/pip{index.parent}:ro" in options
    assert f"{tmp_path}/pip.conf:/etc/pip.conf:ro" in options
    assert "--env" not in options  # which would stay in the image
    written = (tmp_path / "pip.conf").read_text()
    assert f"extra-index-url = file:///run/pip{index} https://example.org/simple\n" in written


def test_a_missing_tool_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "build.py"), "data"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "error: buildah and debootstrap not found; on Debian: apt-get install" in done.stderr


def test_images_json_is_what_compile_reads(tmp_path: Path) -> None:
    build = script("build")
    path = tmp_path / "images.json"
    build.write(path, {build.PREFIX + name: f"registry/{name}@sha256:{'0' * 64}" for name in build.IMAGES})
    assert set(json.loads(path.read_text())) == set(IMAGES)


def test_the_command_does_nothing_in_a_worker_that_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started by spawn or forkserver run the command's file under another name: it must not start again."""
    import runpy

    monkeypatch.setattr("opensora.cli.main", lambda: pytest.fail("started again"))
    runpy.run_path(str(FOLDER / "opensora"), run_name="__mp_main__")
