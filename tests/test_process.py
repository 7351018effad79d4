"""Children are waited for when their parent is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora.process import run_child
from tests.conftest import ROOT

CHILD = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(1)  # as a checkpoint takes time
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(7)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import sys
from opensora.process import run_child
sys.exit(run_child([sys.executable, "-c", {CHILD!r}, sys.argv[1]]))
"""


def test_exit_codes_come_back() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_parent_waits_for_its_child(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "note")]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    assert parent.wait(60) == 7
    assert (tmp_path / "note").read_text() == "saved"


def test_an_interrupt_that_the_child_did_not_heed_still_stops_the_parent(tmp_path: Path) -> None:
    heedless = CHILD.replace("sys.exit(7)", "sys.exit(0)")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace(repr(CHILD), repr(heedless)), str(tmp_path / "note")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert parent.returncode != 0
    assert (tmp_path / "note").read_text() == "saved"
