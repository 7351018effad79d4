"""The command line answers at once, teaches, and turns every user's mistake into one line and an exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from opensora.chain import ALL_STEPS
from tests.conftest import ROOT

HEAVY = ("torch", "transformers", "diffusers", "mlflow", "cv2", "av", "pyarrow", "scenedetect")


def opensora(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opensora.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_help_names_every_step_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['opensora', '--help']\n"
        "from opensora.cli import main\n"
        "try: main()\n"
        f"finally: print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout
    for name in (*ALL_STEPS, "run", "generate", "weights", "results", "config"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["run", "generate", *ALL_STEPS])
def test_every_command_has_help(name: str) -> None:
    from typer.testing import CliRunner

    from opensora.cli import app

    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "--workdir" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("config", "--profile", "dmo"), 2, "did you mean 'demo'"),
        (("config", "--set", "train_video.lrr=1"), 2, "train_video.lrr"),
        (("config", "--set", "train_video.lr=fast"), 2, "train_video.lr"),
        (("config", "--set", "train_video.lr"), 2, "section.key=value"),
        (("config", "--params", "nowhere.yaml"), 2, "no parameter file at nowhere.yaml"),
        (("run", "--profile", "smoke", "--source", "/nowhere"), 1, "/nowhere"),
        (("split", "--profile", "smoke"), 1, "run `opensora download` first"),
        (("train_video", "--profile", "smoke"), 1, "run `opensora"),
        (("run", "--profile", "single_gpu"), 2, "give --source"),
        (("run", "--profile", "single_gpu", "--source", "."), 1, "lacks weights: llava (for caption)"),
        (("caption", "--profile", "single_gpu"), 1, "no weights 'llava'"),
        (("results", "--profile", "smoke"), 1, "has not finished"),
        (("generate", "--checkpoint", "nowhere"), 2, "no prompt"),
        (("generate", "--checkpoint", "nowhere", "--prompt", "x"), 1, "no usable checkpoint in nowhere"),
        (("generate", "--checkpoint", "x", "--prompts-file", "none.txt"), 2, "no prompts file at none.txt"),
        (("generate", "--checkpoint", "models:/none@champion", "--prompt", "x"), 1, "none"),
        (("run", "--profile", "smoke", "--set", "evaluate.prompts_file=none.txt"), 2, "no file at none.txt"),
        (("weights", "inspect", "nowhere.pth"), 1, "no weights file at nowhere.pth"),
        (("weights", "inspect", "params.yaml"), 1, "params.yaml is damaged, or holds more than tensors"),
        (("weights", "import", "nowhere.pth"), 1, "no weights file at nowhere.pth"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    arguments: tuple[str, ...], code: int, expected: str, tmp_path: Path
) -> None:
    extra = () if arguments[0] in ("config", "weights") else ("--workdir", str(tmp_path))
    done = opensora(*arguments, *extra)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in done.stderr


def test_an_empty_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = opensora("run", "--profile", "smoke", "--source", str(tmp_path / "empty"), "--workdir", str(tmp_path / "w"))
    assert done.returncode == 1
    assert "no video" in done.stderr
    assert not (tmp_path / "w" / "smoke" / "download").exists()


def test_the_resolved_config_is_printed() -> None:
    import yaml

    done = opensora("config", "--profile", "h800", "--set", "train_video.lr=1e-5")
    values = yaml.safe_load(done.stdout)
    assert values["train_video"]["lr"] == 1e-5
    assert values["train_video"]["processes"] == 64
