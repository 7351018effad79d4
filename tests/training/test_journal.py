"""losses.jsonl: what was done once stands there once."""

import json
from pathlib import Path

from opensora.training.journal import LOSSES, Journal


def test_a_resumed_run_writes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(1, 6):
        journal.record(step, step / 2)
    with (tmp_path / LOSSES).open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    again = Journal(tmp_path)
    again.cut(3)
    again.record(4, float("nan"), skipped=True)
    again.close()
    lines = [json.loads(line) for line in (tmp_path / LOSSES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2:] == [{"step": 3, "loss": 1.5}, {"step": 4, "loss": None, "skipped": True}]
