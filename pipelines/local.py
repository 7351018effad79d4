"""Run a compiled pipeline on this machine with KFP's own local runner, and tell what happens in few lines."""

import builtins
import io
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import yaml

from pipelines.compile import PipelineError

ROOT = Path(__file__).resolve().parents[1]
COLOUR = re.compile(r"\x1b\[\d*m")
RECORD = re.compile(r"\d\d:\d\d:\d\d\.\d{3} - [A-Z]+ - (.*)", re.DOTALL)  # of KFP's log, in one write
TASK = re.compile(r"Executing task '(.+)'")
FAILED = re.compile(r"(?:Task|Inner task failed:) '([^']+)'")


def run_local(compiled: Path, parameters: Mapping[str, Any], artifacts: Path) -> dict[str, Any]:
    """Run it task by task, each in a process of its own; returns the pipeline's outputs.

    Args:
        artifacts: folder of KFP's small manifests.

    Raises:
        PipelineError: a task failed, with its last line.
    """
    from kfp import components, local

    # The tasks' processes find the code of this checkout, as images hold it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if "python3" in str(artifacts.resolve()):
        raise PipelineError(f"KFP's local runner rewrites `python3` in paths: choose other folders than {artifacts}")
    narration, own_print = Narration(sys.stdout), builtins.print
    with redirect_stdout(narration), _own_temporary_folder():
        warnings.filterwarnings("ignore", module=r"kfp\.local")  # that it has no nodes, claims or secrets
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(artifacts), raise_on_error=True)
        pipeline = components.load_component_from_text(_without_retries(compiled))
        try:
            return dict(pipeline(**parameters).outputs)
        except RuntimeError as error:
            found = FAILED.search(COLOUR.sub("", str(error)))
            what = f"task {found[1]} failed" if found else f"the pipeline failed ({error})"
            raise PipelineError(f"{what}: {narration.reason or 'the lines above say why'}") from error
        finally:
            builtins.print = own_print  # KFP indents by another, and its threads do not all put this one back


@contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """For all that is started in it: KFP leaves a folder in there for each task."""
    before = os.environ.get("TMPDIR")
    with TemporaryDirectory(prefix="opensora-kfp-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def _without_retries(compiled: Path) -> str:
    """The pipeline without the minutes that a cluster waits before it tries a task again: nothing here is preempted."""

    def strip(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: strip(value) for name, value in node.items() if name != "retryPolicy"}
        return [strip(value) for value in node] if isinstance(node, list) else node

    documents = yaml.load_all(compiled.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return yaml.safe_dump_all([strip(document) for document in documents], sort_keys=True)


@dataclass
class _Thread:
    """What a task's lines are in: KFP runs the tasks of a loop in threads."""

    line: str = ""  # without its end yet
    braces: int = 0  # open, of a JSON document that KFP prints


class Narration(io.TextIOBase):
    """Stands in for stdout: the names of tasks and what they say themselves pass, KFP's own reports do not."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._started = out, time.monotonic()
        self._threads: dict[int, _Thread] = {}
        self.reason = ""  # the last error that a task told

    def write(self, text: str) -> int:
        """Take what KFP's log or a task's print writes."""
        plain = COLOUR.sub("", text)
        if record := RECORD.match(plain):
            if task := TASK.match(record[1]):
                self._say(f"── {task[1]} ({time.monotonic() - self._started:.0f} s)")
            return len(text)
        here = self._threads.setdefault(threading.get_ident(), _Thread())
        *lines, here.line = (here.line + plain).split("\n")
        for line in lines:
            self._task_line(line.strip(), here)
        return len(text)

    def _task_line(self, line: str, here: _Thread) -> None:
        if here.braces or line == "{":
            here.braces += line.count("{") - line.count("}")
        elif line and not line.startswith("[KFP Executor") and line.strip("-"):
            if line.startswith("error: "):
                self.reason = line.removeprefix("error: ")
            self._say(line)

    def _say(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()
