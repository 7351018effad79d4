"""Writing generated frames: mp4 for videos, PNG for pictures, and sheets of frames."""

from fractions import Fraction
from pathlib import Path

import numpy as np


def write_clip(path: Path, frames: np.ndarray, fps: float, note: str = "") -> Path:
    """Write uint8 [T, H, W, 3] as `path` with .mp4 (or .png for one frame); whole or not at all; returns the file.

    Args:
        note: stored in the file's metadata.
    """
    if len(frames) == 1:
        from PIL import Image, PngImagePlugin

        path = path.with_suffix(".png")
        part = path.with_name(path.name + ".part")
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", note)
        Image.fromarray(frames[0]).save(part, "png", pnginfo=text)
    else:
        from opensora.data.video import ClipWriter

        path = path.with_suffix(".mp4")
        part = path.with_name(path.name + ".part")
        height, width = frames.shape[1:3]
        writer = ClipWriter(width, height, Fraction(fps).limit_denominator(1001), crf=12, gop=30, note=note)
        for frame in frames:
            writer.add(frame)
        part.write_bytes(writer.finish())
    part.replace(path)
    return path


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
