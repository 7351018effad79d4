"""What evaluations keep does not grow without end."""

import os
from pathlib import Path

from opensora.evaluation.kept import KEEP, prune, touch


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    assert KEEP > 4  # three stages and a champion
    prune(tmp_path / "absent")
    for number in range(5):
        path = tmp_path / str(number)
        if number % 2:
            path.write_text("features")
        else:
            path.mkdir()
            (path / "clip").touch()
        os.utime(path, (number, number))
    touch(tmp_path / "0")
    prune(tmp_path, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "3", "4"}
