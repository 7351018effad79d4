"""What is left to sample: each prompt and seed once a checkpoint, whose clip or row is not whole."""

import json
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.evaluation.sampling import Pair, SampleTask, missing, read_rows, sample_tasks
from opensora.weights import hash_file
from tests.conftest import ROOT

CONFIG = load_config(ROOT / "params.yaml", "smoke", ("evaluate.batch_size=2",)).evaluate
PAIRS: list[Pair] = [("a cat", 1), ("a dog", 2), ("a cat", 3), ("a cat", 1), ("a bird", 4)]


def keep(task: SampleTask) -> None:
    """Leave what a finished task of one prompt leaves."""
    clip = task.result.with_suffix(".mp4")
    clip.parent.mkdir(exist_ok=True)
    clip.write_bytes(b"clip")
    task.result.write_text(json.dumps({"file": clip.name, "sha256": hash_file(clip), "of": task.pairs[0]}))


def tasks_of(tmp_path: Path, pairs: list[Pair], names: tuple[str, ...] = ("stage",)) -> list[SampleTask]:
    makers = dict.fromkeys(names, (tmp_path / "checkpoint", tmp_path / "clips"))
    return sample_tasks(makers, pairs, tmp_path / "text", CONFIG, {})


def test_only_what_is_not_kept_is_sampled(tmp_path: Path) -> None:
    batches = [task.pairs for task in tasks_of(tmp_path, PAIRS, ("stage", "champion"))]
    assert batches == [(("a cat", 1), ("a dog", 2)), (("a cat", 3), ("a bird", 4))]  # one checkpoint is sampled once
    for pair in PAIRS[:3]:
        keep(tasks_of(tmp_path, [pair])[0])
    assert missing(tmp_path / "clips", PAIRS) == [("a bird", 4)]
    assert [row["of"] for row in read_rows(tmp_path / "clips", reversed(PAIRS[:4]))] == [list(p) for p in PAIRS[3::-1]]
    with pytest.raises(FileNotFoundError, match="no clip of 'a bird' with seed 4"):
        read_rows(tmp_path / "clips", PAIRS)


def test_a_damaged_row_or_a_lost_or_changed_clip_is_made_again(tmp_path: Path) -> None:
    pairs = [*PAIRS[:3], PAIRS[4]]
    tasks = [tasks_of(tmp_path, [pair])[0] for pair in pairs]
    for task in tasks:
        keep(task)
    tasks[0].result.write_text("{")
    tasks[1].result.write_text("[]")
    tasks[2].result.with_suffix(".mp4").unlink()
    tasks[3].result.with_suffix(".mp4").write_bytes(b"clap")
    assert missing(tmp_path / "clips", pairs) == pairs
    again = tasks_of(tmp_path, pairs)
    assert [pair for task in again for pair in task.pairs] == pairs
    assert not any(task.result.exists() for task in again)  # or they would be taken as done
