"""The tables that `dvc plots` draws, as dvc.yaml declares them."""

import csv
import shutil
from pathlib import Path

import pytest
import yaml

from opensora.config import TRAIN_STEPS
from opensora.evaluation.plots import MAX_POINTS, averaged, write_plots
from opensora.evaluation.scores import Measured
from opensora.step import write_json
from tests.conftest import ROOT
from tests.end_to_end.command import run
from tests.small_disk import small_disk


def stages(shift: float) -> dict[str, Measured]:
    scores = [{"flicker": 0.5 + shift, "prompt_following": 1.0}, {"flicker": 0.6, "prompt_following": 0.0}]
    metrics = {"flicker": 0.55 + shift / 2, "fd_randconv": 3.25}
    return {name: Measured(["0.mp4", "1.mp4"], scores, metrics, 32) for name in TRAIN_STEPS}


def test_curves_are_averaged_over_equal_runs() -> None:
    curve = [(step, float(step)) for step in range(1, 601)]
    points = averaged(curve)
    assert len(points) == MAX_POINTS
    assert points[0] == (10, 5.5)
    assert averaged(curve[:3]) == curve[:3]


def test_tables(tmp_path: Path) -> None:
    write_plots(tmp_path, ["a, b", "c"], stages(0), {"train_image": [(1, 2.0)]})
    rows = {path.stem: list(csv.reader(path.open(newline=""))) for path in tmp_path.iterdir()}
    assert rows["loss_train_image"] == [["step", "loss"], ["1", "2.0"]]
    assert rows["scores"][1:] == [[f"flicker, {name}", "0.55"] for name in sorted(TRAIN_STEPS)]
    assert rows["distances"][1] == ["fd_randconv, train_highres", "3.25"]
    assert rows["prompts"] == [
        ["prompt", "measure", "value"],
        ["a, b", "prompt_following", "1.0"],
        *[["c", "prompt_following", "0.0"]],
    ]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "16k") as small:
        (small / "ballast").write_bytes(b"x" * shutil.disk_usage(small).free)
        with pytest.raises(OSError, match="No space left"):
            write_plots(small / "plots", ["p", "q"], stages(0), {"train_image": [(1, 2.0)]})
        (small / "ballast").unlink()
        write_plots(small / "plots", ["p", "q"], stages(0), {})
        assert (small / "plots" / "prompts.csv").read_text().count("\n") == 3


def test_dvc_draws_them_and_compares_two_revisions(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    kept = {name: declared[name] for name in ("vars", "plots", "metrics")}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(kept))
    (tmp_path / "params.yaml").write_text("profile: smoke\n")
    folder = tmp_path / "runs" / "smoke" / "evaluate"
    for shift in (0.0, 0.25):
        curves = {name: [(1, 2.0 + shift), (2, 1.0)] for name in TRAIN_STEPS}
        write_plots(folder / "plots", ["p", "q"], stages(shift), curves)
        write_json(folder / "metrics.json", {"train_highres_flicker": 0.5 + shift, "fd_extractor": "randconv"})
        if not shift:
            run("git", "init", "-q", folder=tmp_path)
            run("git", "add", ".", folder=tmp_path)
            run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "one", folder=tmp_path)
    run("dvc", "plots", "diff", "HEAD", "-o", "drawn", folder=tmp_path)
    page = (tmp_path / "drawn" / "index.html").read_text()
    for found in ("Loss by stage", "flicker, train_video", "fd_randconv, train_image", "2.25", "workspace"):
        assert found in page
    difference = run("dvc", "metrics", "diff", "--md", folder=tmp_path)
    assert "| train_highres_flicker | 0.5    | 0.75        | 0.25     |" in difference
