"""`opensora data`: a page and a short text of any finished step; problems a line each, and an exit code."""

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from opensora.config import UserError
from opensora.data_cli import data
from tests.conftest import ROOT
from tests.manifests import clip, finish


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    rows = [clip(number, shard="", path=f"videos/{number}.mp4") for number in range(3)]
    rows.append(clip(3, shard="", path="", kept=False, reason="dead link: HTTP 404"))
    finish(tmp_path / "smoke", "download", [rows])
    for number in range(3):
        (tmp_path / "smoke" / "videos").mkdir(exist_ok=True)
        (tmp_path / "smoke" / "videos" / f"{number}.mp4").touch()
    return tmp_path


def test_report_writes_a_page_and_says_the_counts(runs: Path) -> None:
    done = invoke("report", "--profile", "smoke", "--params", ROOT / "params.yaml", "--workdir", runs)
    assert done.exit_code == 0, done.exception
    page = runs / "smoke" / "data_report.html"
    assert done.stdout.splitlines() == [
        "download: 3 of 4 rows kept, 6.0 s of video",
        "  dead link                        1   25.0 %",
        str(page),
    ]
    assert page.read_text().startswith("<!doctype html>")


def test_report_goes_where_it_is_told_and_takes_thresholds(runs: Path) -> None:
    out = runs / "deep" / "page.html"
    common = ("--profile", "smoke", "--params", ROOT / "params.yaml", "--workdir", runs)
    assert invoke("report", *common, "--out", out, "--set", "score.min_duration_s=1.25").exit_code == 0
    assert "min 1.25" in out.read_text()


def test_report_before_any_step_says_what_to_do(tmp_path: Path) -> None:
    done = invoke("report", "--profile", "smoke", "--params", ROOT / "params.yaml", "--workdir", tmp_path)
    assert isinstance(done.exception, UserError)
    assert "run `opensora download` first" in str(done.exception)


def test_validate_says_sound(runs: Path) -> None:
    done = invoke("validate", runs / "smoke" / "download")
    assert (done.exit_code, done.stdout) == (0, f"{runs / 'smoke' / 'download'}: sound\n")


def test_validate_prints_as_many_problems_as_asked_and_counts_the_rest(runs: Path) -> None:
    finish(runs / "smoke", "download", [[clip(number, shard="", licence="") for number in range(20)]])
    done = invoke("validate", runs / "smoke" / "download", "--limit", 3)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("download/manifest-00000.parquet:1 clip 0000000000000000: licence is empty")
    assert lines[3:] == ["… and 17 more; --limit 20 shows all"]
    assert "20 problems" in done.stderr


def test_validate_of_nothing_readable_ends_with_two(tmp_path: Path) -> None:
    done = invoke("validate", tmp_path)
    assert isinstance(done.exception, UserError)
    assert done.exception.exit_code == 2


@pytest.mark.parametrize("name", ["report", "validate"])
def test_help_loads_nothing_heavy(name: str) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom opensora.data_cli import data\n"
        f"try: data(['{name}', '--help'])\n"
        "finally: print('LOADED', [name for name in ('torch', 'av', 'cv2', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout, done.stderr
    assert "opensora data" in done.stdout
