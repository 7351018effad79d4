"""Work shared by processes: what is done is not done again, and only the champion may fail."""

import errno
from dataclasses import dataclass
from pathlib import Path

import pytest

from opensora.evaluation.share import keep_loaded, share
from opensora.step import StepError


@dataclass(frozen=True)
class Divide:
    """Leaves 12 divided by a number."""

    name: str
    number: int
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name}-{self.number}"

    def do(self) -> None:
        self.result.write_text(str(12 // self.number))


@dataclass(frozen=True)
class Fill(Divide):
    """Finds no space."""

    def do(self) -> None:
        Path("/dev/full").write_text("12")


def test_the_champion_may_fail_and_no_other(tmp_path: Path) -> None:
    tasks = [Divide("champion", 0, tmp_path), Divide("stage", 3, tmp_path), Divide("stage", 4, tmp_path)]
    (tmp_path / "stage-4").write_text("done before")
    assert "division" in share(tasks, 1, may_fail="champion")
    assert (tasks[1].result.read_text(), tasks[2].result.read_text()) == ("4", "done before")
    assert share(tasks[1:], 2) == ""
    with pytest.raises(StepError, match="generation with champion failed: integer division"):
        share(tasks, 1)
    with pytest.raises(OSError, match="No space left") as caught:  # no fault of the champion's
        share([Fill("champion", 1, tmp_path)], 1, may_fail="champion")
    assert caught.value.errno == errno.ENOSPC


def test_one_of_a_kind_stays_loaded() -> None:
    loaded: list[str] = []
    for key in ("a", "a", "b", "a"):
        assert keep_loaded("kind of this test", key, lambda key=key: loaded.append(key) or key) == key
    assert loaded == ["a", "b", "a"]
