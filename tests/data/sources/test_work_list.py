"""The work list: every video once in the order of the list, and memory that its length does not change."""

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from opensora.data.sources.item import Item
from opensora.data.sources.work_list import WorkList, items_file, read_items, write_work_list
from opensora.manifest import Span
from tests.conftest import ROOT


def write(folder: Path, items: Iterator[Item] | list[Item], size: int = 4) -> tuple[WorkList, list[Item]]:
    folder.mkdir()
    done = write_work_list(items, folder, size, lambda item: item.url)
    shards = [read_items(items_file(folder, shard)) for shard in range(done.shards)]
    assert all(len(shard) == size for shard in shards[:-1])
    assert len(list(folder.iterdir())) == done.shards
    return done, [item for shard in shards for item in shard]


def test_rows_of_one_video_are_one_item_where_it_came_first(tmp_path: Path) -> None:
    rows = [
        Item("a", licence="CC0-1.0", spans=(Span(0, 1, "x"),)),
        Item("b", spans=(Span(0, 1),)),
        Item("a", licence="other", spans=(Span(1, 2.5, "y"),)),
        Item("a", spans=(Span(0, 1, "x"),)),
    ]
    _, items = write(tmp_path / "list", rows)
    assert items == [Item("a", licence="CC0-1.0", spans=(Span(0, 1, "x"), Span(1, 2.5, "y"))), rows[1]]


def test_a_long_list_equals_what_a_dictionary_gathers(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [Item(f"http://x/{draw.randrange(900)}", spans=(Span(0, 1 + n, "c"),)) for n in range(3_000)]
    expected: dict[str, Item] = {}
    for row in rows:
        before = expected.get(row.url, replace(row, spans=()))
        expected[row.url] = replace(before, spans=before.spans + row.spans)
    done, items = write(tmp_path / "list", rows, 1000)
    assert items == list(expected.values())
    assert (done.videos, done.shards) == (len(expected), -(-len(expected) // 1000))
    again, _ = write(tmp_path / "again", rows, 1000)
    assert again == done
    assert write(tmp_path / "other", rows[::-1], 1000)[0].digest != done.digest


def test_what_is_no_text_is_refused_and_in_sight(tmp_path: Path) -> None:
    rows = [Item("/d/\udcff.mp4"), Item("/d/ok.mp4"), Item("/d/c.mp4", spans=(Span(0, 1, "half \ud83d"),))]
    _, items = write(tmp_path / "list", rows)
    assert [(item.url, item.reason[:8]) for item in items] == [
        ("/d/\\udcff.mp4", "refused:"),
        ("/d/ok.mp4", ""),
        ("/d/c.mp4", "refused:"),
    ]


PROGRAM = """
import resource, sys
from pathlib import Path
from opensora.config import DownloadConfig
from opensora.data.sources.listing import list_items
from opensora.data.sources.work_list import write_work_list

for name in sys.argv[1:]:
    folder = Path(name + ".items")
    folder.mkdir()
    done = write_work_list(list_items(name, DownloadConfig(), folder), folder, 1000, lambda item: item.url)
    print(done.videos, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    counts = (3_000, 30_000)
    for count in counts:
        lines = (f"https://example.org/{n}.mp4,a caption of several words for number {n}\n" for n in range(count))
        (tmp_path / f"{count}.csv").write_text("url,caption\n" + "".join(lines))
    command = [sys.executable, "-c", PROGRAM, *(str(tmp_path / f"{count}.csv") for count in counts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    (few, before), (many, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == counts
    unit = 1 if sys.platform == "darwin" else 1024
    assert (after - before) * unit < 10 << 20  # as objects the longer list takes some 30 MiB
