"""Cutting a video into normalised clips in one pass: upright, square pixels, one matrix and range, a constant rate."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import cv2
import numpy as np
from av.filter import Graph
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace

from opensora.config import SplitConfig
from opensora.data.timeline import Timeline
from opensora.data.video import Picture, VideoError, pictures, turns, x264_params

OPEN_CLIPS = 8  # encoders at once, each with some 20 MiB; spans that overlap more take another pass
HD_LINES, HD_COLUMNS = 577, 1280  # from which on players take a video that does not say for BT.709
MAX_ASPECT = 4  # of a pixel; a file that says more is wrong
# FFmpeg's numbers of matrices and of primaries, and what its scaler calls them.
MATRICES = {1: "bt709", 4: "fcc", 5: "smpte170m", 6: "smpte170m", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
WIDE_PRIMARIES = {9: "bt2020", 11: "smpte431", 12: "smpte432"}
HDR_TRANSFERS = {16: "smpte2084", 18: "arib-std-b67"}  # FFmpeg numbers of transfers: PQ and HLG
QUARTER_TURNS = {0: [], 1: [("transpose", "cclock")], 2: [("hflip", ""), ("vflip", "")], 3: [("transpose", "clock")]}


class ClipWriter:
    """Encodes one normalised clip: H.264, yuv420p, constant rate, short GOP, no audio, no edit list.

    It is tagged with the matrix of BT.601 and limited range: what readers that know of no tags assume, so that all show
    the same colours.
    """

    def __init__(
        self, target: Path | BinaryIO, width: int, height: int, fps: Fraction, crf: int, gop: int, note: str = ""
    ) -> None:
        # A handle of our own, as a failing write then raises its own error.
        self.handle: BinaryIO = target.open("wb") if isinstance(target, Path) else target
        self.owns_handle = isinstance(target, Path)
        self.frames = 0
        self.fps = fps
        self.container = av.open(self.handle, "w", format="mp4")
        if note:
            self.container.metadata["comment"] = note
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": x264_params(width), "a53cc": "0"}
        self.stream = self.container.add_stream("libx264", rate=fps, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        context = self.stream.codec_context
        context.gop_size = gop
        context.max_b_frames = 0  # no reordering, so no edit list
        context.thread_count = 1  # the same bytes on every machine
        context.colorspace, context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG

    def add(self, frame: av.VideoFrame) -> None:
        """Append a frame of the clip's own size, form and matrix, see `Normaliser`."""
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        frame.pict_type = PictureType.NONE  # else the encoder would make key frames where the source has them
        self.container.mux(self.stream.encode(frame))
        self.frames += 1

    def add_rgb(self, pixels: np.ndarray) -> None:
        """Append one frame uint8 [H, W, 3], scaled down where it is larger."""
        size = (self.stream.width, self.stream.height)
        if (pixels.shape[1], pixels.shape[0]) != size:
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self.add(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG))

    def finish(self) -> None:
        """Write the rest of the mp4."""
        self.container.mux(self.stream.encode(None))
        self._close()

    def abandon(self) -> None:
        """Let go of the file, which is not whole."""
        with suppress(av.FFmpegError, OSError):  # the one that led here is told
            self._close()

    def _close(self) -> None:
        try:
            self.container.close()
        finally:
            if self.owns_handle:
                self.handle.close()


def clip_size(width: int, height: int, max_short_side: int, aspect: Fraction = Fraction(1)) -> tuple[int, int]:
    """Even width and height of a clip: square pixels, scaled down to the limit of the shorter side, never up.

    Args:
        aspect: width of a source's pixel over its height.
    """
    exact = (width * min(1.0, float(aspect)), height / max(1.0, float(aspect)))
    scale = min(1.0, max_short_side / min(exact))
    even = [max(2, 2 * round(side * scale / 2)) for side in exact]
    return min(even[0], width - width % 2), min(even[1], height - height % 2)


class Normaliser:
    """Turns frames as they are stored into those of a clip, by FFmpeg's filters.

    Limited range and the matrix of BT.601 come from any range and matrix; HDR (PQ and HLG) and wide gamuts are mapped
    to BT.709's primaries and curve by the scaler's perceptual intent.
    """

    def __init__(self, max_short_side: int, aspect: Fraction = Fraction(1)) -> None:
        self.max_short_side = max_short_side
        sane = Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT
        self.aspect = aspect if sane else Fraction(1)
        self._graphs: dict[tuple, Graph] = {}

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Width and height of a clip that begins with this frame."""
        width, height = clip_size(frame.width, frame.height, self.max_short_side, self.aspect)
        return (height, width) if turns(frame) % 2 else (width, height)

    def apply(self, frame: av.VideoFrame, size: tuple[int, int]) -> av.VideoFrame:
        """The frame at a clip's size, yuv420p."""
        stored = size[::-1] if turns(frame) % 2 else size
        key = (*_form(frame), turns(frame), stored)
        if key not in self._graphs:
            self._graphs[key] = _graph(frame, [*_scaling(frame, stored), *QUARTER_TURNS[turns(frame)]])
        graph = self._graphs[key]
        graph.vpush(frame)
        return graph.vpull()


def _form(frame: av.VideoFrame) -> tuple:
    """All that a graph must know of its frames."""
    colours = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
    return frame.width, frame.height, frame.format.name, *colours


def _graph(frame: av.VideoFrame, chain: list[tuple[str, str]]) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
        f":colorspace={frame.colorspace}:range={frame.color_range}"
    )
    nodes = [graph.add(name, args) for name, args in [("buffer", source), *chain, ("buffersink", "")]]
    graph.link_nodes(*nodes).configure()
    return graph


def _scaling(frame: av.VideoFrame, size: tuple[int, int]) -> list[tuple[str, str]]:
    """Filters that bring a frame to a size, yuv420p and the clips' colours."""
    width, height = size
    chain = []
    if 0 <= frame.width - width <= 1 and 0 <= frame.height - height <= 1:
        chain.append(("crop", f"{width}:{height}:0:0"))  # an odd side: no need to blur the picture for a pixel
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    options = {
        "w": width,
        "h": height,
        "flags": "area+accurate_rnd+bitexact",
        "out_color_matrix": "smpte170m",
        "out_range": "tv",
    }
    if not frame.format.is_rgb:
        options |= {"in_color_matrix": _matrix(frame), "in_range": "pc" if full else "tv"}
    transfer = HDR_TRANSFERS.get(frame.color_trc)
    if transfer or frame.color_primaries in WIDE_PRIMARIES:
        options |= {
            "in_primaries": WIDE_PRIMARIES.get(frame.color_primaries, "bt709"),
            "in_transfer": transfer or "bt709",
            "out_primaries": "bt709",
            "out_transfer": "bt709",
            "intent": "perceptual",
        }
    chain.append(("scale", ":".join(f"{name}={value}" for name, value in options.items())))
    return [*chain, ("format", "yuv420p")]


def _matrix(frame: av.VideoFrame) -> str:
    """What turned the frame's red, green and blue into brightness and colour; where it does not say, as players do."""
    hd = frame.height >= HD_LINES or frame.width >= HD_COLUMNS
    return MATRICES.get(frame.colorspace, "bt709" if hd else "smpte170m")


@dataclass(frozen=True)
class Cut:
    """A clip to write: the frames [start, end) of the source."""

    start: int
    end: int
    path: Path


@dataclass(frozen=True)
class Written:
    """What became of a cut."""

    frames: int
    fps: Fraction
    width: int  # pixels
    height: int


class _Open:
    """A clip at work."""

    def __init__(self, cut: Cut, writer: ClipWriter, repeats: np.ndarray) -> None:
        self.cut, self.writer, self.repeats = cut, writer, repeats


def cut_clips(
    path: Path, timeline: Timeline, cuts: Sequence[Cut], config: SplitConfig, aspect: Fraction = Fraction(1)
) -> dict[Cut, Written]:
    """Write the clips, which may overlap, decoding the video once (again only where more than `OPEN_CLIPS` overlap).

    A clip has the video's own rate or `config.fps`; a variable rate becomes a constant one, in which frames that last
    longer are repeated.

    Args:
        aspect: width of a pixel over its height.

    Raises:
        VideoError: the video ends before the last clip does.
        OSError: the disk is full.
    """
    fps = Fraction(config.fps).limit_denominator(1001) if config.fps else timeline.rate
    left = sorted(set(cuts), key=lambda cut: (cut.start, cut.end))
    written: dict[Cut, Written] = {}
    while left:
        now, left = _first_pass(left)
        written |= _one_pass(path, timeline, now, fps, config, Normaliser(config.max_short_side, aspect))
    return written


def _first_pass(cuts: list[Cut]) -> tuple[list[Cut], list[Cut]]:
    """Those of the cuts, in order, of which never more than `OPEN_CLIPS` overlap, and the others."""
    now: list[Cut] = []
    later: list[Cut] = []
    for cut in cuts:
        busy = sum(other.end > cut.start for other in now)
        (now if busy < OPEN_CLIPS else later).append(cut)
    return now, later


def _one_pass(
    path: Path, timeline: Timeline, cuts: list[Cut], fps: Fraction, config: SplitConfig, normaliser: Normaliser
) -> dict[Cut, Written]:
    waiting, at_work, written = deque(cuts), list[_Open](), dict[Cut, Written]()
    try:
        for picture in deinterlaced(pictures(path)):
            while waiting and waiting[0].start == picture.index:
                cut = waiting.popleft()
                writer = ClipWriter(cut.path, *normaliser.size(picture.frame), fps, config.crf, config.gop)
                at_work.append(_Open(cut, writer, timeline.repeats(cut.start, cut.end, fps)))
            _show(picture, at_work, normaliser)
            for clip in [clip for clip in at_work if clip.cut.end == picture.index + 1]:
                clip.writer.finish()
                at_work.remove(clip)
                stream = clip.writer.stream
                written[clip.cut] = Written(clip.writer.frames, fps, stream.width, stream.height)
            if not waiting and not at_work:
                return written
        raise VideoError(f"unreadable: it ended before frame {max(cut.end for cut in cuts)}, which was there before")
    finally:
        for clip in at_work:
            clip.writer.abandon()


def _show(picture: Picture, clips: list[_Open], normaliser: Normaliser) -> None:
    """Append a frame to all clips that show it, as often as they do."""
    normal: dict[tuple[int, int], av.VideoFrame] = {}
    for clip in clips:
        size = (clip.writer.stream.width, clip.writer.stream.height)
        for _ in range(clip.repeats[picture.index - clip.cut.start]):
            if size not in normal:
                normal[size] = normaliser.apply(picture.frame, size)
            clip.writer.add(normal[size])


def deinterlaced(source: Iterator[Picture]) -> Iterator[Picture]:
    """The same pictures, those that are flagged as interlaced made whole from both neighbours (bwdif)."""
    graph: Graph | None = None
    form: tuple = ()
    inside: deque[Picture] = deque()
    ending: VideoError | None = None
    while True:
        try:
            picture = next(source, None)
        except VideoError as error:
            picture, ending = None, error
        if graph is not None and (picture is None or _form(picture.frame) != form):
            graph.vpush(None)
            yield from _pulled(graph, inside)
            graph = None
        if picture is None:
            break
        if graph is None and picture.frame.interlaced_frame:
            graph, form = _graph(picture.frame, [("bwdif", "mode=send_frame:deint=interlaced")]), _form(picture.frame)
        if graph is None:
            yield picture
        else:
            inside.append(picture)
            graph.vpush(picture.frame)
            yield from _pulled(graph, inside)
    if ending:
        raise ending


def _pulled(graph: Graph, inside: deque[Picture]) -> Iterator[Picture]:
    """What comes out of a filter that gives a frame for each, some frames later."""
    while inside:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield replace(inside.popleft(), frame=frame)
