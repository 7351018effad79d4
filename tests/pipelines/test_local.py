"""What `run-local` tells: tasks, their own lines, and why one failed."""

import io
import threading
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.local import Narration

pytest.importorskip("kfp", reason="the extra `kubeflow` is not installed")


def test_kfps_reports_are_left_out_and_tasks_lines_kept() -> None:
    out = io.StringIO()
    narration = Narration(out)

    def task(name: str) -> None:
        narration.write(f"08:14:16.290 - INFO - Executing task \x1b[96m'{name}'\x1b[0m\n")
        for line in (
            "[KFP Executor 2026 INFO]: Got executor_input:",
            "{",
            '    "inputs": {',
            "    }",
            "}",
            "-" * 80,
            "",
        ):
            print("    ", end="", file=narration)
            print(line, file=narration)
        print(f"{name}: 4 of ", end="", file=narration)
        print("4 kept", file=narration)
        narration.write(f"08:14:17.000 - INFO - Task '{name}' outputs:\n    manifest: Dataset( name='x',\n   )\n")

    task("split")
    other = threading.Thread(target=task, args=("score",))  # KFP runs a loop's tasks in threads
    print('{ "inputs": {', end="", file=narration)
    other.start()
    other.join(60)
    lines = out.getvalue().splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "── split",
        "split: 4 of 4 kept",
        "── score",
        "score: 4 of 4 kept",
    ]


def test_a_failed_task_is_named_with_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run-local", "release", "--workdir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("error: task trained failed: ")
    assert "train_highres holds no finished step" in last
    assert "── trained" in said.out
