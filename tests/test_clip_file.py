"""Files of clips: each form shows the frames, keeps its note, is the same every time, and is whole or not there."""

import io
import itertools
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from opensora.clip_file import Form, contact_sheet, grid_shape, read_note, write_clip
from opensora.data.video import probe, read_frames
from opensora.demo.shapes import all_scenes, render_clip

FORMS: tuple[Form, ...] = ("mp4", "gif", "png")
NOTES = {
    "empty": "",
    "json": json.dumps({"prompt": "a red circle", "seed": 3}),
    "latin": "Ein Gruß, déjà vu\nsecond line\r\n\ttab ",
    "scripts": 'a "quoted" 漢字 ไทย עברית العربية 🎬 \ufeff ½',
    "json of scripts": json.dumps({"prompt": "漢字 🎬"}, ensure_ascii=False),
    "long": "word 言葉 " * 2000,
}


def clip(count: int = 6, size: int = 64) -> np.ndarray:
    """A moving shape, uint8 [T, size, size, 3]."""
    return render_clip(all_scenes()[5], count, size, np.random.default_rng(0))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def gif_frames(path: Path) -> tuple[np.ndarray, list[int]]:
    """Frames uint8 [T, H, W, 3] of a GIF, and milliseconds of each."""
    picture = Image.open(path)
    frames, delays = [], []
    for index in range(picture.n_frames):
        picture.seek(index)
        frames.append(np.asarray(picture.convert("RGB")))
        delays.append(picture.info["duration"])
    return np.stack(frames), delays


def cut_grid(path: Path) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of a PNG grid, by what the file alone says."""
    picture = Image.open(path)
    count = int(picture.info["frames"])
    rows, columns = grid_shape(count)
    height, width = picture.height // rows, picture.width // columns
    levels = np.asarray(picture)
    places = itertools.islice(itertools.product(range(rows), range(columns)), count)
    return np.stack([levels[y * height : (y + 1) * height, x * width : (x + 1) * width] for y, x in places])


def test_an_mp4_plays_in_browsers_and_shows_the_frames(tmp_path: Path) -> None:
    frames = clip(6)
    path = write_clip(tmp_path / "clip", frames, 12)
    assert path == tmp_path / "clip.mp4"
    seen = probe(path)
    assert (seen.width, seen.height, seen.fps, seen.frames, seen.duration_s) == (64, 64, 12, 6, 0.5)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    assert np.abs(read_frames(path.read_bytes()).astype(int) - frames).mean() < 4


@pytest.mark.parametrize(("height", "width"), [(33, 47), (32, 47), (33, 48), (1, 1)])
def test_odd_sizes_of_an_mp4_repeat_the_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = np.repeat(clip(4)[:, :height, :width], 1, axis=0)
    shown = read_frames(write_clip(tmp_path / "odd", frames, 8).read_bytes()).astype(int)
    assert shown.shape == (4, height + height % 2, width + width % 2, 3)
    assert np.abs(shown[:, :height, :width] - frames).mean() < 4  # in its place, not scaled
    if height % 2:
        assert np.abs(shown[:, height, :width] - frames[:, -1]).mean() < 4


@pytest.mark.parametrize("form", ["mp4", "png"])
def test_one_frame_is_a_picture(tmp_path: Path, form: Form) -> None:
    frames = noise(1, 33, 20, 3)
    path = write_clip(tmp_path / "one", frames, 8, note="n", form=form)
    assert path == tmp_path / "one.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), frames[0])
    assert read_note(path) == "n"


def test_a_gif_loops_and_shows_every_frame_for_its_time(tmp_path: Path) -> None:
    frames = clip(16)
    path = write_clip(tmp_path / "clip", frames, 8, form="gif")
    assert path == tmp_path / "clip.gif"
    shown, delays = gif_frames(path)
    assert np.abs(shown.astype(int) - frames).mean() < 1
    assert Image.open(path).info["loop"] == 0
    assert sum(delays) == 2000  # 12.5 hundredths of a second each
    assert set(delays) == {120, 130}
    ends = np.cumsum(delays)
    assert np.abs(ends - 125 * np.arange(1, 17)).max() <= 5


def test_a_gif_has_no_delay_that_browsers_would_stretch(tmp_path: Path) -> None:
    _, delays = gif_frames(write_clip(tmp_path / "fast", clip(5), 60, form="gif"))
    assert min(delays) == 20
    _, delays = gif_frames(write_clip(tmp_path / "slow", clip(3), 0.5, form="gif"))
    assert delays == [2000] * 3


def test_a_gifs_palette_is_the_clips_own(tmp_path: Path) -> None:
    values = np.arange(0, 240, 4, dtype=np.uint8)  # 60 greens, all but the first in the last frame only
    frames = np.zeros((3, 5, 12, 3), np.uint8)
    frames[2, ..., 1] = values.reshape(5, 12)
    shown, _ = gif_frames(write_clip(tmp_path / "greens", frames[1:], 8, form="gif"))
    np.testing.assert_array_equal(shown, frames[1:])
    still, delays = gif_frames(write_clip(tmp_path / "still", frames[:2], 8, form="gif"))
    assert (len(still), delays) == (1, [250])  # the same frame for twice the time
    one, _ = gif_frames(write_clip(tmp_path / "one", frames[2:], 8, form="gif"))
    np.testing.assert_array_equal(one, frames[2:])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 12, 13, 16, 17])
def test_a_grid_holds_all_frames_exactly(tmp_path: Path, count: int) -> None:
    frames = noise(count, 7, 11, 3)
    path = write_clip(tmp_path / "grid", frames, 8, form="png")
    assert path == tmp_path / "grid.png"
    np.testing.assert_array_equal(cut_grid(path), frames)
    rows, columns = grid_shape(count)
    assert rows * columns >= count > (rows - 1) * columns
    assert rows <= columns <= rows + 1


@pytest.mark.parametrize("note", list(NOTES))
@pytest.mark.parametrize("form", FORMS)
def test_notes_are_read_back_exactly(tmp_path: Path, form: Form, note: str) -> None:
    path = write_clip(tmp_path / "clip", clip(3), 8, note=NOTES[note], form=form)
    assert read_note(path) == NOTES[note]
    assert read_note(path.rename(tmp_path / "without-a-suffix")) == NOTES[note]  # the content tells what it is


def test_a_note_is_where_other_programs_look(tmp_path: Path) -> None:
    with av.open(str(write_clip(tmp_path / "clip", clip(3), 8, note="é漢"))) as container:
        assert container.metadata["comment"] == "é漢"
    assert (
        Image.open(write_clip(tmp_path / "clip", clip(3), 8, note="é漢", form="gif")).info["comment"].decode() == "é漢"
    )
    gif = Image.open(write_clip(tmp_path / "clip", clip(3), 8, note="é漢", form="gif"))
    assert gif.info["comment"].decode() == "é漢"
    png = Image.open(write_clip(tmp_path / "clip", clip(3), 8, note="é漢", form="png"))
    assert png.info["comment"] == "é漢"


def test_the_note_of_a_huge_grid_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("png", "gif"):
        path = write_clip(tmp_path / "huge", noise(4, 40, 40, 3), 8, note="n", form=form)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(path)
        assert read_note(path) == "n"


def test_what_is_no_clip_has_no_note(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_note(tmp_path / "nothing")
    for data in (b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", bytes(100)):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ValueError, match=r"file is no mp4, GIF or PNG that can be read: .+$"):
            read_note(tmp_path / "file")
    for form, kept in (("mp4", 200), ("gif", 12), ("png", 40)):
        data = write_clip(tmp_path / "clip", clip(3), 8, note="n" * 500, form=form).read_bytes()
        (tmp_path / "file").write_bytes(data[:kept])
        with pytest.raises(ValueError, match="that can be read"):
            read_note(tmp_path / "file")
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    assert read_note(tmp_path / "plain.png") == ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [64, 320])
def test_the_same_frames_and_note_give_the_same_bytes(tmp_path: Path, form: Form, size: int) -> None:
    first = write_clip(tmp_path / "first", clip(4, size), 8, note="é漢", form=form).read_bytes()
    again = write_clip(tmp_path / "second", clip(4, size), 8, note="é漢", form=form).read_bytes()
    other = write_clip(tmp_path / "third", clip(4, size), 8, note="è漢", form=form).read_bytes()
    assert first == again != other


def test_a_name_keeps_its_dots(tmp_path: Path) -> None:
    assert write_clip(tmp_path / "v1.5 of it", clip(2), 8).name == "v1.5 of it.mp4"
    assert write_clip(tmp_path / "clip.mp4", clip(2), 8, form="gif").name == "clip.gif"


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files of this process cannot grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_whole_or_as_before(tmp_path: Path, form: Form) -> None:
    path = write_clip(tmp_path / "clip", clip(2), 8, form=form)
    before = path.read_bytes()
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_clip(tmp_path / "clip", noise(4, 64, 64, 3), 8, form=form)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

    (tmp_path / f"taken.{form}").mkdir()
    with pytest.raises(IsADirectoryError):
        write_clip(tmp_path / "taken", clip(2), 8, form=form)
    assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / f"taken.{form}"])


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError):
        write_clip(tmp_path / "file" / "clip", clip(2), 8)
    with pytest.raises(FileNotFoundError):
        write_clip(tmp_path / "no folder" / "clip", clip(2), 8)
    assert (tmp_path / "file").read_text() == "kept"


def test_bad_arguments_write_nothing(tmp_path: Path) -> None:
    frames = clip(2)
    for wrong in (frames[0], frames[..., :1], frames.astype(float), frames[:0]):
        with pytest.raises(ValueError, match=r"frames must be uint8 \[T, H, W, 3\]"):
            write_clip(tmp_path / "clip", wrong, 8)
    for fps in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fps must be"):
            write_clip(tmp_path / "clip", frames, fps)
    for note in ("a\0b", "\ud800"):
        with pytest.raises(ValueError, match=r"NUL|surrogates"):
            write_clip(tmp_path / "clip", frames, 8, note=note)
    with pytest.raises(ValueError, match="no such form 'webm', expected mp4, gif or png"):
        write_clip(tmp_path / "clip", frames, 8, form="webm")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_sheet_shows_rows_of_frames(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", [("one", clip(4)), ("two", clip(8))], columns=3, scale=1)
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())))
    np.testing.assert_array_equal(sheet[6:70, 210:274], clip(4)[0])
    np.testing.assert_array_equal(sheet[76:140, 350:414], clip(8)[-1])
