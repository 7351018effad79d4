"""The gallery stands alone: one file, nothing loaded from elsewhere, every clip, score and difference in it."""

import base64
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from opensora import gallery
from opensora.clip_file import write_clip
from opensora.demo.shapes import held_out_scenes
from opensora.evaluation.champion import Champion
from opensora.evaluation.measuring import Findings
from opensora.evaluation.reference import Reference, Shape
from opensora.evaluation.scores import Measured
from opensora.gallery import write_gallery

HIDDEN = held_out_scenes()[0]
PROMPTS = ["a red circle moving up", HIDDEN.caption, "<script>alert(1)</script>"]
RIGHT = {"colour": 1, "shape": 1, "direction": 1, "prompt_following": 1}
WRONG = {"colour": 1, "shape": 0, "direction": 1, "prompt_following": 0}


def measured(folder: Path, name: str, frames: int, flicker: float, first: dict, second: dict) -> Measured:
    """Clips of the three prompts with given scores."""
    clip = np.full((frames, 32, 32, 3), 100, np.uint8)
    files = [write_clip(folder / f"{name}{number}", clip, 8).name for number in range(3)]
    parts = [
        {part: value for part, value in scores.items() if frames > 1 or part != "direction"}
        for scores in (first, second, {})
    ]
    metrics = {"shape": (first["shape"] + second["shape"]) / 2, "flicker": flicker, "fd_randconv": 1 - flicker}
    seen: list[dict | None] = [None, {"colour": HIDDEN.colour, "shape": "blob"}, None]
    return Measured(files, [{"flicker": flicker} | scores for scores in parts], metrics, 32, 16, seen)


def page_of(folder: Path, champion: Champion | None, flicker: float = 0.9) -> str:
    stages = {
        "train_image": measured(folder, "i", 1, 1.0, RIGHT, WRONG),
        "train_video": measured(folder, "v", 4, flicker, RIGHT, WRONG),
    }
    found = Findings(stages, Reference(Shape(4, 32, 32, 1), (), None), champion, ("randconv",), {"fvd": "no <weights>"})
    curves = {"train_image": [(1, 1.0), (2, 0.5)]}
    metrics = {"caption_exact_match": 0.97, "extractors": "randconv", "reference": "rendered scenes"}
    write_gallery(folder, "opensora-smoke", PROMPTS, [5, 6, 7], found, metrics, curves)
    return (folder / "gallery.html").read_text()


class Tags(HTMLParser):
    """What a page loads, and the attributes of its prompts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.prompts: list[dict[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag == "article":
            self.prompts.append(values)


def test_the_page_holds_everything(tmp_path: Path) -> None:
    page = page_of(tmp_path, None)
    sources = Tags(page).sources
    assert len(sources) == 6
    assert all(source.startswith("data:") for source in sources)
    assert base64.b64decode(sources[1].split(",")[1]) == (tmp_path / "v0.mp4").read_bytes()
    assert page.count("held out</span>") == 1
    assert f"<s>{HIDDEN.shape}</s> blob" in page
    for said in ("There is no champion yet", "97%", "train_image: 1.000 → 0.500 after 2 steps", "no &lt;weights&gt;"):
        assert said in page
    assert not list(tmp_path.glob("*.part"))


def test_foreign_text_never_runs(tmp_path: Path) -> None:
    page = page_of(tmp_path, None)
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    assert "alert" not in script
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_a_champion_stands_beside_the_candidate(tmp_path: Path) -> None:
    other = measured(tmp_path, "c", 4, 0.8, WRONG, WRONG)
    page = page_of(tmp_path, Champion("3", "abc", measured=other))
    tags = Tags(page)
    assert len(tags.sources) == 9
    assert page.count("<figcaption>champion version 3</figcaption>") == 3
    first, second, third = tags.prompts
    assert (first["data-is"], second["data-is"]) == ("better", "held-out wrong")
    assert (first["data-d-prompt-following"], second["data-d-flicker"]) == ("1", "0.1")
    assert third["data-is"] == "better"  # by flicker, since nothing else is measured of it
    row = next(row for row in page.split("<tr>") if "FD by randconv" in row)
    assert "<td class='n good'>−0.100</td>" in row  # a distance that fell is better
    row = next(row for row in page.split("<tr>") if row.startswith("<td>flicker"))
    assert "<td class='n good'>+0.100</td>" in row

    worse = page_of(tmp_path, Champion("3", "abc", measured=other), flicker=0.7)
    row = next(row for row in worse.split("<tr>") if "FD by randconv" in row)
    assert "<td class='n bad'>+0.100</td>" in row


def test_a_champion_that_cannot_be_shown_is_said(tmp_path: Path) -> None:
    page = page_of(tmp_path, Champion("3", "abc", unavailable="its <file> is gone"))
    assert "Champion version 3 is not shown:</b> its &lt;file&gt; is gone" in page
    assert "difference" not in page.split("<main>")[0]


def test_large_clips_stay_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "EMBEDDED_MIB", 0)
    page = page_of(tmp_path, None)
    assert all((tmp_path / source).is_file() for source in Tags(page).sources)
    assert "media-src data: 'self' file:" in page
