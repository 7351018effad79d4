"""The clips of the gallery: the files themselves while one page can hold them, else previews of the size it shows."""

import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

HEIGHT = 180  # of a clip on the page, pixels
LEAST = 16 << 10  # bytes of a preview; for less, the clips of fewer prompts are shown
HEAD = 64  # bytes of an address before and after its data, at most
CRFS = (20, 24, 28, 32, 36, 40)  # of x264, the best first
JPEG_QUALITIES = (90, 80, 65, 50)
TYPES = {".mp4": "video/mp4", ".png": "image/png"}


def embed_clips(folder: Path, prompts: Sequence[Sequence[str]], room: int) -> tuple[dict[str, str], int]:
    """`data:` addresses of clips, by file, that take `room` bytes at most together; and how many are previews.

    Where the files do not fit, those above an equal share become previews of 180 lines (never enlarged, the same frames
    and frame rate), as good as their share allows. Clips of the last prompts are left out where shares would be too
    small to look at.

    Args:
        folder: what the files are relative to.
        prompts: the files of each prompt.
    """
    sizes = [[(folder / file).stat().st_size for file in files] for files in prompts]
    room = room // 4 * 3  # an address has four letters for three bytes
    share = _share([size for part in sizes for size in part], room)
    if share < LEAST:
        columns = max((len(files) for files in prompts), default=1)
        prompts = prompts[: max(0, room) // (columns * (LEAST + HEAD))]
        share = _share([size for part in sizes[: len(prompts)] for size in part], room)
    found, previews = {}, 0
    for file in dict.fromkeys(file for files in prompts for file in files):
        data, kind = (folder / file).read_bytes(), TYPES[Path(file).suffix]
        if len(data) > share:
            small = next((one for one in _previews(data, kind) if len(one[0]) <= share), None)
            if small is None:
                continue
            (data, kind), previews = small, previews + 1
        found[file] = f"data:{kind};base64,{b64encode(data).decode()}"
    return found, previews


def _share(sizes: Sequence[int], room: int) -> int:
    """The most bytes that each may take where small ones leave what they do not need to the others."""
    left = room - HEAD * len(sizes)
    for number, size in enumerate(sorted(sizes)):
        if size * (len(sizes) - number) > left:
            return left // (len(sizes) - number)
        left -= size
    return max(LEAST, *sizes, 0)


def _previews(data: bytes, kind: str) -> Iterator[tuple[bytes, str]]:
    """Ever smaller ones, with their type."""
    if kind == "image/png":
        from PIL import Image

        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture.thumbnail((picture.width, HEIGHT))
        for quality in JPEG_QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "jpeg", quality=quality)
            yield buffer.getvalue(), "image/jpeg"
    else:
        frames, fps = _shrink(data)
        for crf in CRFS:
            yield _encode(frames, fps, crf), kind


def _shrink(data: bytes) -> tuple[list[np.ndarray], float]:
    """Frames uint8 [H ≤ 180, W, 3] of a clip, and how many there are a second."""
    import av
    import cv2

    frames = []
    with av.open(io.BytesIO(data), "r") as container:
        rate = container.streams.video[0].average_rate
        for frame in container.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24")
            scale = min(1.0, HEIGHT / frame.height)
            size = (max(2, 2 * round(frame.width * scale / 2)), max(2, 2 * round(frame.height * scale / 2)))
            frames.append(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels)
    assert rate is not None  # `write_clip` wrote it
    return frames, float(rate)


def _encode(frames: Sequence[np.ndarray], fps: float, crf: int) -> bytes:
    """H.264 in yuv420p, which every browser plays; one key frame, as nobody seeks in a clip of seconds."""
    from fractions import Fraction

    from opensora.data.cut import ClipWriter

    height, width = frames[0].shape[:2]
    buffer = io.BytesIO()
    writer = ClipWriter(buffer, width, height, Fraction(fps).limit_denominator(1001), crf, gop=len(frames))
    for frame in frames:
        writer.add_rgb(frame)
    writer.finish()
    return buffer.getvalue()
