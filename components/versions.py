"""A step's folder under DVC, without git: pushed to a remote, and fetched again by its revision.

A revision is the hash that DVC gives the content of the folder, as 1f3870be274f6c49b3e31a0c6728957f.dir: the same data
has the same revision, whoever made it, and nothing else has it.
"""

import subprocess
import sys
from pathlib import Path

import yaml

from opensora.step import StepError

REMOTE = "store"
# Links, so that there is no second copy of terabytes.
CONFIG = """[core]
    no_scm = True
    analytics = false
    check_update = false
    remote = {name}
[cache]
    type = "reflink,hardlink,copy"
['remote "{name}"']
    url = {url}
"""


def push(folder: Path, remote: str) -> str:
    """Push the finished step in `folder` to the DVC remote at that URL; returns its revision.

    Raises:
        StepError: DVC cannot; its last line says why.
    """
    _prepare(folder.parent, remote)
    _dvc(folder.parent, "add", folder.name)
    revision = _dvc_file(folder)["outs"][0]["md5"]
    _dvc(folder.parent, "push", f"{folder.name}.dvc")
    return revision


def pull(folder: Path, revision: str, remote: str) -> None:
    """Fetch the step of that revision into `folder`; what lies there already is not fetched again.

    Raises:
        StepError: DVC cannot, as when the remote does not hold it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _prepare(folder.parent, remote)
    out = {"path": folder.name, "md5": revision, "hash": "md5"}
    folder.with_name(f"{folder.name}.dvc").write_text(yaml.safe_dump({"outs": [out]}))
    _dvc(folder.parent, "pull", "--force", f"{folder.name}.dvc")


def _dvc_file(folder: Path) -> dict:
    return yaml.safe_load(folder.with_name(f"{folder.name}.dvc").read_text())


def _prepare(folder: Path, remote: str) -> None:
    """Make `folder` a DVC repository without git; five commands of DVC would take as many seconds to write the same."""
    url = remote if "://" in remote else Path(remote).resolve()
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / ".dvc" / "config").write_text(CONFIG.format(name=REMOTE, url=url))


def _dvc(folder: Path, *arguments: str) -> None:
    beside = Path(sys.executable).with_name("dvc")
    command = [str(beside) if beside.is_file() else "dvc", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise StepError(f"dvc {arguments[0]} failed in {folder}: {lines[-1]}")
