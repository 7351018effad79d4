"""A step's folder appears whole or not at all, also when the disk is full."""

import gc
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opensora.step import Report, StepError, StepFolder, fingerprint, lock_file, read_report, write_json
from tests.conftest import ROOT
from tests.small_disk import small_disk


def test_a_folder_is_final_only_when_finished(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", "key")
    work = folder.open()
    (work / "data").write_text("x")
    assert not (tmp_path / "step").exists()
    report = folder.finish(Report("step", total=2, kept=1, dropped={"dark": 1}))
    assert (tmp_path / "step" / "data").read_text() == "x"
    assert read_report(tmp_path / "step") == report
    assert report.peak_memory_mib > 1
    assert StepFolder(tmp_path / "step", "key").is_done()
    assert not StepFolder(tmp_path / "step", "another key").is_done()


def test_a_stopped_run_keeps_its_work_and_another_one_does_not(tmp_path: Path) -> None:
    (StepFolder(tmp_path / "step", "key").open() / "half").touch()
    assert (StepFolder(tmp_path / "step", "key").open() / "half").exists()
    assert not (StepFolder(tmp_path / "step", "another").open() / "half").exists()


def test_two_processes_cannot_work_on_one_step(tmp_path: Path) -> None:
    first = StepFolder(tmp_path / "step", "key")
    first.open()
    with pytest.raises(StepError, match="another process is working on"):
        StepFolder(tmp_path / "step", "key").open()
    first.finish(Report("step"))


def test_a_lock_can_be_shared_on_nfs_too(tmp_path: Path) -> None:
    """Its client gives a shared lock only to a file that is open for reading."""
    for shared in (True, False):
        handle = lock_file(tmp_path / f"{shared}.lock", shared)
        assert handle is not None
        assert handle.readable()
        handle.close()


def test_an_unfinished_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="run `opensora split` first"):
        read_report(tmp_path / "split")


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    with small_disk(tmp_path / "small", "16k") as small:
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                write_json(small / "a.json", "x" * 50_000)
        assert list(small.iterdir()) == []  # else each try would take what the last one had left free
    assert not list(tmp_path.glob("*.json*"))


def test_fingerprints_follow_values_not_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


MEASURE = """
import subprocess, sys
from opensora.step import PeakMemory
memory = PeakMemory()
found = [memory.read_mib()]
code = "x = bytearray(200 << 20); print('ready', flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
found.append(memory.read_mib())
child.communicate(b"\\n")
found.append(memory.read_mib())
print(*found)
"""


def test_memory_of_children_counts() -> None:
    """In a process of its own: children that other tests left would come and go meanwhile."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    before, during, after = (float(text) for text in done.stdout.split())
    assert during > before + 190
    assert after > before + 190  # a peak stays


def test_a_step_that_failed_is_not_watched_any_more(tmp_path: Path) -> None:
    def fail() -> None:
        StepFolder(tmp_path / "step", "key").open()
        raise StepError("no")

    before = set(threading.enumerate())
    with pytest.raises(StepError, match="no"):
        fail()
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(60)
    assert not any(thread.is_alive() for thread in left)


def test_a_kill_while_a_step_ends_never_leaves_half_of_its_output_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(key: str) -> None:
        folder = StepFolder(tmp_path / "step", key)
        work = folder.open()
        for number in range(10):
            (work / f"{number}").write_text(key)
        folder.finish(Report("step"))

    def kill(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and path.name != ".partial":
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt

    finish("old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            finish("new")
    for key in ("old", "new"):
        if StepFolder(tmp_path / "step", key).is_done():
            assert len([path for path in (tmp_path / "step").iterdir() if path.read_text() == key]) == 10
    finish("new")
    assert sorted(path.name for path in (tmp_path / ".partial").iterdir() if path.is_dir()) == []


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "600k") as small:
        command = [sys.executable, "-m", "opensora.cli", "demo_videos", "--profile", "smoke"]
        command += ["--set", "demo.videos=200", "--workdir", str(small)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (small / "smoke" / "demo_videos").exists()
        assert not list(small.rglob("manifest.csv"))
