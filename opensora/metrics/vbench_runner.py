"""Runs the package `vbench` in an environment of its own, since it pins libraries that this project has newer.

Each dimension runs in a process of its own: one that lacks its weights or a library, or hangs, costs itself alone.
"""

import json
import math
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from opensora.metrics.vbench import DIMENSIONS

# Those that VBench offers for prompts that are not its own.
CUSTOM = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
START_S = 120.0  # in which the environment's python must answer
NOT_SET = "evaluate.vbench is not set"
LOOK = """
import importlib.util, sys
from importlib.metadata import PackageNotFoundError, version
if importlib.util.find_spec("vbench") is None:
    sys.exit(1)
try:
    print(version("vbench"))
except PackageNotFoundError:
    print("of unknown version")
"""
RUN = """
import json, sys
task = json.load(sys.stdin)
import torch
from vbench import VBench
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
bench = VBench(device, task["full_info"], task["output"])
bench.evaluate(
    videos_path=task["videos"],
    name=task["dimension"],
    prompt_list=task["prompts"],
    dimension_list=[task["dimension"]],
    mode=task["mode"],
)
"""
NOWHERE = "http://127.0.0.1:9"  # a proxy that nobody answers for: what would be downloaded fails at once


@dataclass(frozen=True)
class Outcome:
    """What VBench said."""

    scores: dict[str, float] = field(default_factory=dict)  # by dimension
    absent: dict[str, str] = field(default_factory=dict)  # by dimension, why there is no score


def find_version(python: str) -> str:
    """The package's version in the environment of `python`, a path; empty if it cannot run there."""
    return _look(python)[0]


def why_not(python: str) -> str:
    """Why VBench cannot run by `python`, a path; empty if it can."""
    return _look(python)[1]


def _look(python: str) -> tuple[str, str]:
    """Version, or the reason why there is none."""
    if not python:
        return "", NOT_SET
    try:
        done = subprocess.run(
            [python, "-I", "-c", LOOK], capture_output=True, timeout=START_S, stdin=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        return "", f"evaluate.vbench: {python} cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return "", f"evaluate.vbench: {python} did not answer in {START_S:.0f} s"
    if done.returncode:
        return "", f"evaluate.vbench: {python} has no package vbench"
    return done.stdout.strip(), ""


def run_vbench(
    python: str,
    videos: Path,
    output: Path,
    dimensions: Sequence[str] = CUSTOM,
    *,
    full_info: Path | None = None,
    prompts: Mapping[str, str] | None = None,
    timeout_s: float = 3600,
    offline: bool = True,
) -> Outcome:
    """Scores of a folder of videos by VBench.

    What VBench writes lies in `output`, a `<dimension>_eval_results.json` and a `<dimension>.log` each. A dimension
    whose result is there is not run again, so give each set of videos a folder.

    Args:
        python: of the environment in which `vbench` is installed.
        videos: folder of mp4 files, and nothing else.
        dimensions: some of `CUSTOM` for prompts of one's own.
        full_info: `VBench_full_info.json`: the videos are of VBench's prompts and named as `vbench.video_name` does.
        prompts: for prompts of one's own, the prompt of each file name; None: the file names are the prompts.
        timeout_s: of one dimension.
        offline: let no weights be downloaded; they must lie where VBench keeps them, in `~/.cache/vbench`.

    Raises:
        ValueError: a name that is no dimension of VBench.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"{unknown} are no dimensions of VBench; expected some of {', '.join(DIMENSIONS)}")
    reason = why_not(python)
    if reason:
        return Outcome(absent=dict.fromkeys(dimensions, reason))
    output.mkdir(parents=True, exist_ok=True)
    task = {
        "videos": str(videos.resolve()),
        "output": str(output.resolve()),
        "full_info": str(full_info.resolve()) if full_info else "",
        "mode": "vbench_standard" if full_info else "custom_input",
        "prompts": dict(prompts) if prompts else [],
    }
    outcome = Outcome()
    for dimension in dimensions:
        result = output / f"{dimension}_eval_results.json"
        try:
            if not result.is_file():
                _run(python, task | {"dimension": dimension}, output / f"{dimension}.log", timeout_s, offline)
            outcome.scores[dimension] = read_score(result, dimension)
        except ValueError as error:
            outcome.absent[dimension] = str(error)
    return outcome


def read_score(path: Path, dimension: str) -> float:
    """The score in a result file of VBench, `{dimension: [score, [videos]]}`; raises ValueError."""
    try:
        score = json.loads(path.read_text(encoding="utf-8"))[dimension][0]
    except FileNotFoundError:
        raise ValueError(f"vbench left no {path.name}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} holds no score of {dimension}; delete it to run that again") from error
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{path} has the score {score!r}")
    return float(score)


def _run(python: str, task: Mapping[str, object], log: Path, timeout_s: float, offline: bool) -> None:
    """One dimension; raises ValueError with the reason of a failure."""
    env = dict(os.environ)
    if offline:
        env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
        env |= {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        child = subprocess.Popen(
            [python, "-I", "-c", RUN],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=str(task["output"]),
            env=env,
            start_new_session=True,  # so that what it started, downloads as well, ends with it
        )
        try:
            child.communicate(json.dumps(task).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ValueError(f"vbench took longer than {timeout_s:.0f} s; {log} has its output") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise ValueError(f"vbench failed: {last} ({log})")
