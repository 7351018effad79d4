"""The page stands alone, shows real clips with their reasons, and holds up against foreign text and damaged shards."""

import base64
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.data.reporting.report import write_report
from opensora.manifest import GIVEN, Clip, list_parts, read_manifest, read_part, write_part
from opensora.step import StepError
from tests.conftest import ROOT
from tests.manifests import clip, finish


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "img":
            self.pictures.append(dict(attrs))


@pytest.fixture
def scored(clips: Path, tmp_path: Path) -> Path:
    """A score step of which some clips were dropped, beside its shards."""
    base = tmp_path / "smoke"
    for step in ("download", "split", "score"):
        shutil.copytree(clips / step, base / step)
    path = list_parts(base / "score")[0]
    rows = read_part(path)
    first, second, *others = [number for number, row in enumerate(rows) if row.kept]
    rows[first] = replace(rows[first], kept=False, reason="still: motion 0.01 < 0.02")
    rows[second] = replace(rows[second], caption="a red circle", caption_model=GIVEN)
    for number in others:
        rows[number] = replace(rows[number], caption="a blue square that moves up", caption_model="llava")
    write_part(path, rows)
    return base


def report(base: Path) -> tuple[str, str]:
    written = write_report(base / "page.html", base, load_config(ROOT / "params.yaml", "smoke").score)
    return written.path.read_text(), written.summary


def test_the_page_shows_real_clips_and_stands_alone(scored: Path) -> None:
    text, summary = report(scored)
    page = Page(text)
    rows = read_manifest(scored / "score")

    kept = [row for row in rows if row.kept]
    assert f"{len(kept)} of {len(rows)} rows kept" in summary
    assert re.search(r"still +1 +6\.2 %", summary)
    assert "script" not in page.tags
    inside = [link for link in page.links if link.startswith("#")]
    assert {link[1:] for link in inside} <= set(page.ids)
    outside = [link for link in page.links if not link.startswith("#")]
    assert all(link.startswith("data:image/webp;base64,") for link in outside)
    assert "default-src 'none'" in text
    assert len(page.pictures) == min(len(kept), 12) + len(rows) - len(kept)
    for picture in page.pictures:
        assert base64.b64decode((picture["src"] or "").split(",")[1])[:4] == b"RIFF"
        assert "start, middle and end of clip" in (picture["alt"] or "")
    assert "still: motion 0.01 &lt; 0.02" in text
    assert "min 0.2" in text  # the threshold of the profile
    assert "64×64" in text
    assert "a blue square that moves up" in text
    assert "CC0-1.0" in text
    assert len(text) < 5_000_000
    assert not list(scored.glob("*.part"))


def test_the_same_data_give_the_same_page(scored: Path) -> None:
    assert report(scored) == report(scored)


def test_pictures_show_the_start_the_middle_and_the_end(scored: Path) -> None:
    import cv2
    import numpy as np

    from opensora.data.reporting.thumbnails import HEIGHT, Task, make_strip
    from opensora.data.shards import read_clip
    from opensora.data.video import read_frames

    row = next(row for row in read_manifest(scored / "split") if row.kept)
    data = make_strip(Task(scored / "split", row))
    strip = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    frames = read_frames(read_clip(scored / "split", row))
    assert strip.shape == (HEIGHT, 3 * HEIGHT, 3)
    for place, index in enumerate((0, (row.frames - 1) // 2, row.frames - 1)):
        shown = cv2.resize(strip[:, place * HEIGHT : (place + 1) * HEIGHT], (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(shown.astype(int) - frames[index].astype(int)).mean() < 12


def test_damaged_and_missing_shards_leave_out_their_pictures(scored: Path) -> None:
    shards = sorted((scored / "split").glob("clips-*.tar"))
    for shard in shards:
        shard.write_bytes(b"\0" * shard.stat().st_size)
    assert not Page(report(scored)[0]).pictures
    for shard in shards:
        shard.unlink()
    text, _ = report(scored)
    assert not Page(text).pictures
    assert "still: motion" in text


def test_the_page_is_limited(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(Page(report(scored)[0]).pictures)
    monkeypatch.setattr("opensora.data.reporting.report.IMAGE_BYTES", 3000)
    text, _ = report(scored)
    pictures = Page(text).pictures
    assert 0 < len(pictures) < whole
    assert sum(len(picture["src"] or "") for picture in pictures) < 3000 * 1.4 + 30 * len(pictures)


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script><img src=x onerror='alert(1)'>"
    rows = [
        clip(
            1,
            source=f"https://example.org/{evil}",
            caption=evil,
            caption_model=evil,
            licence=evil,
            scores={"motion": float("inf")},
        ),
        clip(2, kept=False, reason=f"{evil}: {evil}", scores={evil: 1.0, "motion": float("nan")}),
    ]
    finish(tmp_path, "download", [rows])
    text, _ = report(tmp_path)
    page = Page(text)
    assert "script" not in page.tags
    assert not page.pictures
    assert "alert(1)" in text


def test_after_download_alone_there_is_a_page_too(tmp_path: Path) -> None:
    rows = [clip(1, shard="", path="videos/1.mp4"), clip(2, shard="", width=0, kept=False, reason="dead link: 404")]
    finish(tmp_path, "download", [rows])
    text, summary = report(tmp_path)
    assert "dead link" in summary
    assert "https://example.org/2.mp4" in text


def test_many_rows_are_counted_all_and_drawn_from_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.data.reporting.survey.VALUES", 50)
    parts: list[list[Clip]] = [
        [clip(part * 100 + number, scores={"motion": float(number)}) for number in range(100)] for part in range(5)
    ]
    finish(tmp_path, "download", parts)
    text, summary = report(tmp_path)
    assert "500 of 500 rows kept" in summary
    assert "a sample of 50 kept and 0 dropped rows" in text


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no data step has finished"):
        report(tmp_path)
