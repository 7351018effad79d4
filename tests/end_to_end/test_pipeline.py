"""The whole smoke chain as a compiled Kubeflow pipeline, by KFP's own local runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opensora.chain import ALL_STEPS
from tests.conftest import ROOT

pytest.importorskip("kfp", reason="the extra `kubeflow` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # on a machine that does other things too


def run_local(name: str, workdir: Path, *options: str) -> str:
    command = [sys.executable, "-m", "opensora.cli", "pipeline", "run-local", name, "--workdir", str(workdir)]
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def results(folder: Path) -> dict[str, tuple[int, int]]:
    """State of every file that a step, the registry or the store of videos holds; caches keep an index up to date."""
    places = [folder / name for name in (*ALL_STEPS, "videos")] + [folder.parent / "registry"]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_the_full_pipeline_runs_here_and_a_second_run_repeats_nothing(tmp_path: Path) -> None:
    workdir, remote = tmp_path / "runs", tmp_path / "remote"
    remote.mkdir()
    said = run_local("full", workdir, "-p", f"remote={remote}", "-p", "code_revision=0123abc")
    folder = workdir / "smoke"
    reports = {step: json.loads((folder / step / "report.json").read_text()) for step in ALL_STEPS}
    assert reports["train_highres"]["metrics"]["loss"] > 0
    assert "full: True" in said  # promoted: the smoke profile's gate asks for nothing

    artifacts = workdir / "artifacts"
    (gallery,) = artifacts.glob("*/**/evaluate/gallery")
    assert "<html" in gallery.read_text()
    (gate,) = artifacts.glob("*/**/promote/gate")
    assert "promoted" in gate.read_text()
    revision = yaml.safe_load((folder / "encode.dvc").read_text())["outs"][0]["md5"]
    (described,) = artifacts.glob("*/**/train-highres/checkpoint")
    assert json.loads(described.read_text())["data_revision"] == revision
    pushed = {path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()}
    assert f"files/md5/{revision[:2]}/{revision[2:]}" in pushed

    before = results(folder)
    said = run_local(
        "full", workdir, "-p", f"remote={remote}", "-p", "code_revision=4567def", "-p", "data_revision=raw-2"
    )
    assert results(folder) == before
    assert said.count("nothing to train") == 3
    assert "step 2/" not in said

    # Training alone, on the set that the remote holds.
    said = run_local("training", workdir, "-p", f"remote={remote}", "-p", f"data_revision={revision}")
    assert said.count("nothing to train") == 3
    assert results(folder).keys() == before.keys()
