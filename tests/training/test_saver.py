"""Saving beside the training: one at a time, errors come out, and nothing is removed before its successor is whole."""

import threading
from pathlib import Path

import pytest
import torch

from opensora.training import saver as module
from opensora.training.checkpoint import CheckpointError, newest_checkpoint
from opensora.training.saver import Saver, Snapshot
from tests.training.test_checkpoint import DESCRIPTION, names
from tests.training.test_checkpoint import small_files as small_files  # a fixture

WAIT_S = 60.0


def snapshot(step: int, size: int = 10) -> Snapshot:
    weights = {"a": torch.full((size,), float(step))}
    return Snapshot(step, weights, weights, {}, {"0/cpu": torch.get_rng_state()}, DESCRIPTION)


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, real, at_once = threading.Event(), module.save_checkpoint, []

    def slow(*args: object, **values: object) -> Path:
        assert may_write.wait(WAIT_S)
        at_once.append(sum(thread.name == "saver" for thread in threading.enumerate()))
        return real(*args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_checkpoint", slow)
    saved: list[Path] = []
    with Saver(tmp_path, keep=1, saved=saved.append) as saver:
        saver.save(snapshot(1))
        assert not saved  # the call is over, the writing has not begun
        may_write.set()
        saver.save(snapshot(2))  # waits for the first
        assert [path.name for path in saved][:1] == ["step-00000001"]
        saver.wait()
        assert names(tmp_path) == ["step-00000002"]
    assert at_once == [1, 1]


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1)
    saver.save(snapshot(1))
    saver.wait()
    saver.save(snapshot(2, size=1 << 16))
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        saver.wait()
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    assert names(tmp_path) == ["step-00000001"]
    with pytest.raises(CheckpointError, match="step 3"), Saver(tmp_path, keep=1) as again:
        again.save(snapshot(3, size=1 << 16))


@pytest.mark.usefixtures("small_files")
def test_the_error_of_the_loop_is_not_hidden_by_one_of_the_saver(tmp_path: Path) -> None:
    def fail(saver: Saver) -> None:
        with saver:
            saver.save(snapshot(1, size=1 << 16))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(Saver(tmp_path, keep=1))


def test_a_snapshot_is_told_from_the_thread_when_it_failed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver = Saver(tmp_path / "checkpoints", keep=1)
    assert not saver.failed
    saver.save(snapshot(1))
    for thread in threading.enumerate():
        if thread.name == "saver":
            thread.join(WAIT_S)
    assert saver.failed
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.save(snapshot(2))
