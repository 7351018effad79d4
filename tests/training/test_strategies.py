"""A stage on two processes, however they share the work, is the stage on one, which goes on where they stopped."""

import shutil
from pathlib import Path

import pytest

from opensora.training.worker import train_in_process
from tests.training.runs import STAGE, STEPS, config, finish, losses, prepare, train

QUIET = "model.class_dropout_prob=0.0"  # each process that has samples of its own drops captions of its own


@pytest.fixture(scope="module")
def alone(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    return train(config(QUIET), encoded, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "settings",
    [
        ("batch_size=2", "strategy=fsdp", "activation_checkpointing=full"),
        ("batch_size=4", "sequence_parallel=2"),
        ("batch_size=1", "accumulate=2", "activation_checkpointing=selective"),
    ],
    ids=["fsdp", "sequence parallel", "micro-batches"],
)
def test_two_processes_train_like_one(settings: tuple[str, ...], alone: Path, encoded: Path, tmp_path: Path) -> None:
    values = config(
        QUIET, f"{STAGE}.processes=2", f"{STAGE}.keep_checkpoints=9", *(f"{STAGE}.{setting}" for setting in settings)
    )
    work = prepare(values, encoded, tmp_path / "two")
    finish(work)
    close(work, alone)
    # What they left at step 6, one process goes on with, as if they had been stopped there.
    one = prepare(config(QUIET), encoded, tmp_path / "one")
    shutil.copytree(work / "checkpoints" / "step-00000006", one / "checkpoints" / "step-00000006")
    shutil.copy(work / "losses.jsonl", one)
    train_in_process(one)
    close(one, alone)


def close(one: Path, other: Path) -> None:
    assert len(losses(one)) == len(losses(other)) == STEPS
    for (_, first), (_, second) in zip(losses(one), losses(other), strict=True):
        assert first == pytest.approx(second, rel=1e-4)
