"""A process of a stage that cannot write ends with one line and not with a traceback."""

import errno
import subprocess
import sys

import pytest

from tests.conftest import ROOT

REFUSED = """
import sys
from opensora.training import worker
def refuse(work):
    raise OSError(int(sys.argv[2]), "refused")
worker.train_in_process = refuse
sys.exit(worker.main())
"""


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk quota is used up; free some space"),
        (errno.EROFS, "the disk is read-only; make it writable"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line(number: int, said: str) -> None:
    command = [sys.executable, "-c", REFUSED, "work", str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"error: {said} and start again to resume\n"
