"""Rows and finished steps made by hand, for tests of what reads them."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opensora.manifest import Clip, Tally, part_name, write_part
from opensora.step import Report, write_json


def clip(number: int, **changes: Any) -> Clip:
    """A kept clip of two seconds."""
    base = Clip(
        clip_id=f"{number:016x}",
        source=f"https://example.org/{number}.mp4",
        source_sha256=f"{number:064x}",
        end_s=2.0,
        end_frame=50,
        frames=50,
        fps=25.0,
        width=64,
        height=32,
        shard="clips-00000-00.tar",
        offset=512,
        size=100,
    )
    return replace(base, **changes)


def finish(base: Path, step: str, parts: list[list[Clip]]) -> Path:
    """The folder of a finished step that holds these rows."""
    folder = base / step
    folder.mkdir(parents=True, exist_ok=True)
    for index, rows in enumerate(parts):
        write_part(folder / part_name(index), rows)
    tally = Tally().add(row for part in parts for row in part)
    report = Report(step, total=tally.total, kept=tally.kept, dropped=dict(tally.dropped))
    write_json(folder / "report.json", asdict(report))
    return folder
