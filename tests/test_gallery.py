"""The gallery stands alone: one file, nothing loaded from elsewhere, every clip, score and difference in it."""

import base64
import io
import re
import shutil
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from opensora import gallery
from opensora.clip_file import write_clip
from opensora.data.video import read_frames
from opensora.demo.shapes import held_out_scenes
from opensora.evaluation.champion import Champion
from opensora.evaluation.measuring import Findings
from opensora.evaluation.reference import Reference, Shape
from opensora.evaluation.scores import Measured
from opensora.gallery import write_gallery
from tests.small_disk import small_disk

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


def film(number: int, height: int, width: int, frames: int = 8) -> np.ndarray:
    """Grey texture that moves, which takes many bytes: uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(number)
    texture = rng.integers(0, 256, (height // 8, width // 4), dtype=np.uint8)
    picture = cv2.cvtColor(cv2.resize(texture, (2 * width, height)), cv2.COLOR_GRAY2RGB)
    return np.stack([picture[:, 4 * index : 4 * index + width] for index in range(frames)])


def test_clips_that_are_too_large_are_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page stands alone and under its limit; what is small on the page already is not touched."""
    prompts, seeds = [f"scene {number}" for number in range(6)], list(range(6))
    picture, tiny, large = (
        [write_clip(tmp_path / f"{name}{number}", film(number, *size), 12).name for number in seeds]
        for name, size in (("p", (400, 300, 1)), ("t", (48, 48)), ("l", (400, 300)))
    )
    scores = [{"flicker": 0.5}] * 6
    heights = {"train_image": (picture, 400), "train_video": (tiny, 48), "train_highres": (large, 400)}
    stages = {name: Measured(files, scores, {}, height) for name, (files, height) in heights.items()}
    found = Findings(stages, Reference(Shape(8, 400, 300, 1), (), None), None, ("randconv",), {})
    whole = sum((tmp_path / file).stat().st_size for file in (*picture, *tiny, *large))

    def sources(limit: int) -> list[str]:
        monkeypatch.setattr(gallery, "PAGE_MIB", limit / 2**20)
        write_gallery(tmp_path, "opensora-smoke", prompts, seeds, found, {}, {})
        assert (tmp_path / "gallery.html").stat().st_size <= limit
        found_sources = Tags((tmp_path / "gallery.html").read_text()).sources
        assert all(source.startswith("data:") for source in found_sources)
        return found_sources

    assert len(sources(2 * whole)) == 18
    assert "previews" not in (tmp_path / "gallery.html").read_text()
    shown = sources(gallery.SPARE + (450 << 10))
    assert (tmp_path / "gallery.html").read_text().count("Large clips are shown as previews (12)") == 1
    assert len(shown) == 18
    for number in seeds:
        image, small, video = (base64.b64decode(source.split(",")[1]) for source in shown[3 * number : 3 * number + 3])
        assert Image.open(io.BytesIO(image)).size == (135, 180)
        assert small == (tmp_path / tiny[number]).read_bytes()
        with av.open(io.BytesIO(video)) as container:
            stream = container.streams.video[0]
            about = (stream.codec.name, stream.pix_fmt, stream.height, stream.average_rate, stream.frames)
        assert about == ("h264", "yuv420p", 180, 12, 8)
        exact = read_frames((tmp_path / large[number]).read_bytes())[3]
        apart = cv2.resize(exact, (136, 180), interpolation=cv2.INTER_AREA) - read_frames(video)[3].astype(float)
        assert np.abs(apart).mean() < 6  # grey levels

    few = sources(gallery.SPARE + (160 << 10))  # no room for previews of all prompts
    assert 0 < len(few) < 18
    page = (tmp_path / "gallery.html").read_text()
    assert f"<code>{large[5]}</code>" in page
    assert "not all clips are shown." in page
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_leaves_the_page_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "160k") as small:
        page_of(small, None)
        before = (small / "gallery.html").read_bytes()
        (small / "ballast").write_bytes(b"x" * (shutil.disk_usage(small).free - 4096))
        with pytest.raises(OSError, match="No space left"):
            page_of(small, None)
        assert (small / "gallery.html").read_bytes() == before
        assert not list(small.glob("*.part"))
        (small / "ballast").unlink()
        page_of(small, None)
