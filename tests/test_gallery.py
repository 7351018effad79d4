"""The gallery stands alone: one file, nothing loaded from elsewhere, every clip and verdict in it."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from opensora.clip_file import write_clip
from opensora.demo.shapes import held_out_scenes
from opensora.gallery import write_gallery


def row(folder: Path, name: str, frames: int, seen: dict | None) -> dict:
    clip = np.full((frames, 32, 32, 3), 100, np.uint8)
    return {"frames": frames, "file": write_clip(folder / name, clip, 8).name, "seen": seen}


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_everything(tmp_path: Path) -> None:
    hidden = held_out_scenes()[0]
    prompts = ["a red circle moving up", hidden.caption, "<script>alert(1)</script>"]
    right = {"colour": "red", "shape": "circle", "direction": "up"}
    wrong = {"colour": hidden.colour, "shape": None, "direction": hidden.direction}
    results = {
        "train_image": [row(tmp_path, f"i{n}", 1, seen) for n, seen in enumerate((right, wrong, None))],
        "train_video": [row(tmp_path, f"v{n}", 4, seen) for n, seen in enumerate((right, wrong, None))],
    }
    metrics = {"train_image_shape": 0.5, "train_video_shape": 0.75, "caption_exact_match": 0.97}
    page = tmp_path / "gallery.html"
    write_gallery(page, prompts, results, metrics, {"train_image": [(1, 1.0), (2, 0.5)]}, tmp_path)
    text = page.read_text()

    links = Links()
    links.feed(text)
    assert len(links.found) == 6
    assert all(link.startswith("data:") for link in links.found)
    embedded = base64.b64decode(links.found[1].split(",")[1])
    assert embedded == (tmp_path / results["train_video"][0]["file"]).read_bytes()
    assert "<script>" not in text
    assert text.count("held out</span>") == 1
    assert text.count("<span class=bad>?</span>") == 2
    assert len(re.findall("class=good", text)) == (2 + 3) + (1 + 2)
    assert "75%" in text
    assert "97%" in text
    assert "train_image: 1.000 → 0.500 after 2 steps" in text
    assert not list(tmp_path.glob("*.part"))
