"""What Kubeflow Pipelines costs: the local smoke chain over the same steps by command line, and compiling.

    python -m benchmarks.kubeflow        # five minutes on two CPU cores; benchmarks/results/kubeflow.json

Both ways run the same work on an empty folder: a process a task, the shares of a data step one command each, two at a
time as KFP's local runner has them. Wall time, since that is what a user waits for: run it alone on the machine.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import save
from opensora.chain import ALL_STEPS

SHARES = 2
SHARED = ("download", "split", "score", "caption", "encode")
OVERHEAD_TASKS = ("check-weights", "list-shares", "version")  # that have no command
TASKS = len(ALL_STEPS) + SHARES * len(SHARED) + len(OVERHEAD_TASKS)
COMPILE_ROUNDS = 3


def opensora(*arguments: str) -> list[str]:
    """A command line of the project."""
    return [sys.executable, "-m", "opensora.cli", *arguments]


def wall(*commands: Sequence[str]) -> float:
    """Seconds of commands that run at the same time.

    Raises:
        RuntimeError: one failed; its last line says why.
    """
    start = time.perf_counter()
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    outputs = [process.communicate()[0] for process in started]
    seconds = time.perf_counter() - start
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{process.args} failed: {output.strip().splitlines()[-1]}")
    return seconds


def by_command_line(folder: Path) -> float:
    """Every share and step as a command."""
    common = ["--profile", "smoke", "--workdir", str(folder)]
    seconds = 0.0
    for step in ALL_STEPS:
        if step in SHARED:
            shares = [f"executor.share={index}/{SHARES}" for index in range(SHARES)]
            seconds += wall(*(share_command(step, share, common) for share in shares))
        seconds += wall(opensora(step, *common))
    return seconds


def share_command(step: str, share: str, common: Sequence[str]) -> list[str]:
    """A share of a step; that it leaves the step unfinished is no failure here."""
    code = (
        "import sys; from pathlib import Path; from opensora.chain import run_step; "
        "from opensora.config import load_config; from opensora.step import ShareDone; "
        "config = load_config(Path('params.yaml'), 'smoke', (sys.argv[2],))\n"
        "try:\n    run_step(sys.argv[1], config, Path(sys.argv[3]))\n"
        "except ShareDone:\n    pass"
    )
    return [sys.executable, "-c", code, step, share, common[-1]]


def by_pipeline(folder: Path) -> float:
    """The compiled pipeline, by KFP's local runner."""
    return wall(opensora("pipeline", "run-local", "full", "--workdir", str(folder), "-p", f"shares={SHARES}"))


def main() -> None:
    """Measure, print and keep it."""
    with tempfile.TemporaryDirectory(prefix="opensora-") as name:
        root = Path(name)
        compiled = opensora("pipeline", "compile", "full", "-o", str(root / "full.yaml"))
        compiling = statistics.median(wall(compiled) for _ in range(COMPILE_ROUNDS))
        plain = by_command_line(root / "plain")
        pipeline = by_pipeline(root / "pipeline")
    figures = {
        "seconds by command line": plain,
        "seconds as a pipeline": pipeline,
        "pipeline / command line": pipeline / plain,
        "seconds a task that the pipeline adds": (pipeline - plain) / TASKS,
        "seconds to compile `full`, with the start of Python": compiling,
    }
    figures = {key: round(value, 3) for key, value in figures.items()}
    for key, value in figures.items():
        print(f"{key:<55} {value:.3f}", flush=True)
    print(json.dumps(figures))
    print(save("kubeflow", {"command": "python -m benchmarks.kubeflow", "tasks": TASKS, "figures": figures}))


if __name__ == "__main__":
    main()
