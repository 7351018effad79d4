"""Opening a video that nobody vouches for: which stream is the video, and what the file's head says about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

PICTURE_CODECS = {"png", "apng", "gif", "webp", "bmp", "tiff", "jpegls", "jpeg2000", "ppm", "svg"}
PLAYLISTS = {"hls", "dash", "concat", "imf", "sdp", "rtsp"}  # they name other files, which would be opened too
LENGTH_IN_HEAD = {"mov", "matroska", "avi", "flv"}  # FFmpeg guesses the length of other files from what is there
MAX_PIXELS = 1 << 26  # of a frame: twice 8K; a larger one takes a gigabyte to decode


class VideoError(ValueError):
    """A file is no usable video; the message starts with a reason and a colon."""


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream that is no cover picture; one thread, and nothing but this file is opened.

    Raises:
        VideoError: "empty", "unreadable", "not a video" or "too large".
    """
    if path.stat().st_size == 0:
        raise VideoError("empty: the file has no bytes")
    limits = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "file"}
    try:
        # An absolute path, since FFmpeg reads "a:b.mp4" as a protocol.
        with av.open(str(path.absolute()), options=limits, metadata_errors="replace") as container:
            stream = _pick(container)
            context = stream.codec_context
            if context.width * context.height > MAX_PIXELS:
                raise VideoError(f"too large: {context.width}x{context.height} pixels, at most {MAX_PIXELS} in all")
            context.thread_count = 1
            context.options = {"max_pixels": limits["max_pixels"]}
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"unreadable: {error.strerror or error}") from None


def _pick(container: InputContainer) -> VideoStream:
    form = container.format.name
    if form.split(",")[0] in PLAYLISTS:
        raise VideoError(f"not a video: a list of files ({form})")
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("not a video: no video stream")
    context = streams[0].codec_context
    if context is None:
        raise VideoError("unreadable: nothing here decodes its codec")
    if context.name in PICTURE_CODECS or form.endswith("_pipe") or form == "image2":
        raise VideoError(f"not a video: a picture ({context.name}) under a video's name")
    return streams[0]


def nominal_rate(stream: VideoStream) -> Fraction:
    """Frames a second as the file says, on the average; 0 when it does not."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(0)
    return Fraction(rate.numerator, rate.denominator) if rate.denominator else Fraction(0)


@dataclass(frozen=True)
class Length:
    """From when to when a video lasts, as its file says; `end_s` is 0 where it does not."""

    start_s: float = 0.0
    end_s: float = 0.0
    of_all: bool = False  # the end of the stream that lasts longest, not of the video


def declared_length(container: InputContainer, stream: VideoStream) -> Length:
    """What a file's head says, which is true even if its tail is lost."""
    form = container.format.name.split(",")[0]
    if form not in LENGTH_IN_HEAD:
        return Length()
    if form == "avi":  # its duration is guessed when the index, which lies at the end, is lost
        rate = nominal_rate(stream)
        return Length(0.0, stream.frames / float(rate) if rate else 0.0)
    unit = stream.time_base or Fraction(0)
    start = float((stream.start_time or 0) * unit)
    if stream.duration:
        return Length(start, start + float(stream.duration * unit))
    return Length(start, (container.duration or 0) / av.time_base, of_all=True)
