"""Writing generated frames: mp4, GIF or a PNG grid with a note in it, pictures, and sheets of frames."""

import io
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Form = Literal["mp4", "gif", "png"]

CRF = 12  # of x264; no loss to see
GOP = 30  # frames from one key frame to the next
PALETTE_PIXELS = 2**18  # pixels that a GIF's palette is chosen from
LEAST_DELAY = 2  # hundredths of a second; browsers show anything quicker at ten frames a second
FRAMES_KEY, NOTE_KEY = "frames", "comment"  # of a PNG's texts


def write_clip(path: Path, frames: np.ndarray, fps: float, note: str = "", form: Form = "mp4") -> Path:
    """Write uint8 [T, H, W, 3] as `path` with the suffix of its form; whole or not at all; returns the file.

    The same frames and note give the same bytes.

    Args:
        path: its suffix is replaced if it is one of a form's, else the form's is added.
        fps: frames a second; a PNG does not show it.
        note: any text without a NUL, stored in the file's metadata; `read_note` reads it.
        form: "mp4": H.264, yuv420p. An odd height or width repeats the last row or column, because yuv420p needs even
            sizes. One frame becomes a .png.
            "gif": loops, with up to 256 colours chosen for the clip; a frame that is the same as the one before it is
            stored as a longer delay. No delay is under 0.02 s, so more than 50 frames a second play slower.
            "png": all frames in a grid, `grid_shape` tells its size, in reading order, black after the last.

    Raises:
        ValueError: frames of another shape or type, an impossible `fps`, an unknown form, a NUL or half a surrogate
            pair in the note.
        OSError: the file cannot be written; nothing is left then.
    """
    _check(frames, fps, note)
    match "png" if form == "mp4" and len(frames) == 1 else form:
        case "mp4":
            suffix, data = ".mp4", _mp4(frames, fps, note)
        case "gif":
            suffix, data = ".gif", _gif(frames, fps, note)
        case "png":
            suffix, data = ".png", _png(frames, note)
        case _:
            raise ValueError(f"no such form {form!r}, expected mp4, gif or png")
    stem = path.stem if path.suffix in (".mp4", ".gif", ".png") else path.name
    file = path.with_name(stem + suffix)
    _replace(file, data)
    return file


def read_note(path: Path) -> str:
    """The note in a file of `write_clip`, whatever its name; empty where there is none.

    Raises:
        ValueError: the file is no mp4, GIF or PNG, or a damaged one.
        OSError: the file cannot be read.
    """
    import av
    from PIL.GifImagePlugin import GifImageFile
    from PIL.PngImagePlugin import PngImageFile

    with path.open("rb") as handle:
        head = handle.read(8)
        handle.seek(0)
        try:
            # Not Image.open, which refuses pictures of many pixels; the note is read and no pixel.
            if head == b"\x89PNG\r\n\x1a\n":
                return str(PngImageFile(handle).info.get(NOTE_KEY, ""))
            if head[:4] == b"GIF8":
                return GifImageFile(handle).info.get("comment", b"").decode()
            with av.open(handle, format="mp4") as container:
                return container.metadata.get("comment", "")
        except (av.FFmpegError, SyntaxError, ValueError, EOFError, OSError, IndexError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{path} is no mp4, GIF or PNG that can be read: {reason}") from error


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of the grid that holds `count` frames: as many columns as rows, or one more."""
    columns = math.isqrt(count - 1) + 1
    return math.ceil(count / columns), columns


def _check(frames: np.ndarray, fps: float, note: str) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be a positive number, got {fps}")
    if "\0" in note:
        raise ValueError("the note holds a NUL, which ends a text in mp4 and PNG files")
    note.encode()  # half a surrogate pair is no text


def _mp4(frames: np.ndarray, fps: float, note: str) -> bytes:
    from opensora.data.cut import ClipWriter

    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    buffer = io.BytesIO()
    writer = ClipWriter(buffer, width + width % 2, height + height % 2, rate, crf=CRF, gop=GOP, note=note)
    for frame in frames:
        writer.add_rgb(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
    writer.finish()
    return buffer.getvalue()


def _gif(frames: np.ndarray, fps: float, note: str) -> bytes:
    palette = _palette(frames)
    pictures = _with_palette(frames, palette)
    ends = [round(100 * number / fps) for number in range(len(frames) + 1)]  # hundredths of a second
    delays = [10 * max(end - start, LEAST_DELAY) for start, end in zip(ends, ends[1:], strict=False)]  # milliseconds
    buffer = io.BytesIO()
    next(pictures).save(
        buffer,
        "gif",
        save_all=True,
        append_images=pictures,
        duration=delays,
        loop=0,  # for ever
        comment=note.encode(),
        palette=palette.getpalette(),  # one for the file, not one a frame
    )
    return buffer.getvalue()


def _palette(frames: np.ndarray) -> "Image.Image":
    """A picture whose palette holds up to 256 colours for frames uint8 [T, H, W, 3]."""
    from PIL import Image

    pixels = frames.reshape(-1, 3)
    if len(pixels) > PALETTE_PIXELS:
        pixels = pixels[np.random.default_rng(0).integers(len(pixels), size=PALETTE_PIXELS)]
    return Image.fromarray(pixels[:, None]).quantize(256, Image.Quantize.MEDIANCUT)


def _with_palette(frames: np.ndarray, palette: "Image.Image") -> "Iterator[Image.Image]":
    """Undithered: dithering would make what stands still flicker."""
    from PIL import Image

    for frame in frames:
        yield Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)


def _png(frames: np.ndarray, note: str) -> bytes:
    from PIL import Image, PngImagePlugin

    count, height, width = frames.shape[:3]
    rows, columns = grid_shape(count)
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[:count] = frames
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    texts = PngImagePlugin.PngInfo()
    texts.add_text(NOTE_KEY, note)  # iTXt where Latin-1 has no letters for it
    texts.add_text(FRAMES_KEY, str(count))
    buffer = io.BytesIO()
    Image.fromarray(grid).save(buffer, "png", pnginfo=texts)
    return buffer.getvalue()


def _replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader sees the whole file or the one before."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def contact_sheet(path: Path, rows: list[tuple[str, np.ndarray]], columns: int = 8, scale: int = 2) -> None:
    """A PNG with one row a clip (its caption, then `columns` frames over time), frames enlarged by `scale`."""
    from PIL import Image, ImageDraw

    side, gap, left = rows[0][1].shape[1] * scale, 6, 210
    sheet = Image.new("RGB", (left + columns * (side + gap), len(rows) * (side + gap) + gap), (18, 18, 22))
    draw = ImageDraw.Draw(sheet)
    for row, (caption, frames) in enumerate(rows):
        top = gap + row * (side + gap)
        draw.text((10, top + side // 2 - 6), caption, fill=(230, 230, 230))
        for column in range(columns):
            frame = frames[round(column * (len(frames) - 1) / max(columns - 1, 1))]
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * (side + gap), top))
    sheet.save(path)
