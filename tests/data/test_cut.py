"""Normalised clips from files of every kind: exact frames, upright, one size of pixels, one matrix and range."""

import errno
import io
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from opensora.config import SplitConfig
from opensora.data.cut import Cut, clip_size, cut_clips
from opensora.data.shots import Scan, find_clips, scan_video
from opensora.data.video import Picture, TruncatedError, VideoError, decode, pictures, probe, read_frames
from tests.shared import shared

CONFIG = SplitConfig(max_short_side=512)
CHART = ((200, 30, 30), (30, 180, 40), (40, 60, 200), (220, 210, 60), (128, 128, 128), (16, 16, 16), (240, 240, 240))


def chart(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Stripes of colours below a row of bits that count the frames."""
    frame = np.empty((height, width, 3), np.uint8)
    for index, colour in enumerate(CHART):
        frame[:, index * width // len(CHART) :] = colour
    side = width // 8
    for bit in range(8):
        frame[:side, bit * side : bit * side + side] = 255 * (number >> bit & 1)
    return frame


def numbers(frames: Sequence[np.ndarray] | np.ndarray) -> list[int]:
    found = []
    for frame in frames:
        side = frame.shape[1] // 8
        found.append(sum(int(frame[side // 2, bit * side + side // 2, 0] > 127) << bit for bit in range(8)))
    return found


def shown(path: Path) -> tuple[list[int], list[Picture], TruncatedError | None]:
    """The numbers of all frames, the frames, and what is raised after them."""
    found, seen = [], []
    try:
        for picture in pictures(path):
            found.append(picture)
            seen.append(picture.frame.to_ndarray(format="rgb24"))
    except TruncatedError as error:
        return numbers(seen), found, error
    return numbers(seen), found, None


def write(
    path: Path,
    codec: str = "libx264",
    form: str = "yuv420p",
    matrix: Colorspace = Colorspace.ITU709,
    full: bool = False,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    frames: int = 24,
    head: dict[str, str] | None = None,
    size: tuple[int, int] = (128, 96),
) -> Path:
    """A video of numbered charts at 12 frames a second."""
    with av.open(str(path), "w", options=head or {}) as container:
        stream = container.add_stream(codec, rate=12, options={"crf": "10"} | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, form
        context = stream.codec_context
        context.colorspace = {Colorspace.ITU709: 1, Colorspace.ITU601: 6}[matrix]
        context.color_range = 2 if full else 1
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(chart(number, size[1], size[0]), format="rgb24").reformat(
                format=form, dst_colorspace=matrix, dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG
            )
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_one(path: Path, tmp_path: Path, config: SplitConfig = CONFIG) -> tuple[Scan, np.ndarray]:
    """The whole video as one clip, as decoded by PyAV."""
    scan = scan_video(path, config)
    cut = Cut(0, scan.timeline.frames, tmp_path / "clip.mp4")
    written = cut_clips(path, scan.timeline, [cut], config, scan.aspect)[cut]
    frames = read_frames(cut.path.read_bytes())
    assert len(frames) == written.frames
    assert frames.shape[1:3] == (written.height, written.width)
    return scan, frames


def colour_error(frame: np.ndarray) -> float:
    """Mean levels between the stripes as they were meant and as they are."""
    width = frame.shape[1] / len(CHART)
    centres = [frame[60, int((index + 0.5) * width)].astype(int) for index in range(len(CHART))]
    return float(np.abs(np.array(centres) - np.array(CHART)).mean())


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("bt709.mp4", {}),
        ("bt601.mp4", {"matrix": Colorspace.ITU601}),
        ("full.mp4", {"full": True}),
        ("ten.mp4", {"form": "yuv420p10le"}),
        ("ten_full.mp4", {"form": "yuv420p10le", "full": True}),
        ("444.mkv", {"form": "yuv444p"}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "10", "svtav1-params": "color-range=0"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "b": "0"}}),
    ],
)
def test_every_reader_sees_the_same_colours_and_frames(tmp_path: Path, name: str, about: dict) -> None:
    # A child process writes: SVT-AV1, run by root, gives the process that it is in real-time priority and one core, for
    # ever, and whatever that process starts inherits both.
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            path = child.submit(write, tmp_path / name, **about).result(timeout=120)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this build of FFmpeg does not encode it: {error}")
    _, frames = cut_one(path, tmp_path)
    assert numbers(frames) == list(range(24))
    assert colour_error(frames[5]) < 3
    _, other = cv2.VideoCapture(str(tmp_path / "clip.mp4")).read()
    assert colour_error(other[..., ::-1]) < 3.5
    decord = pytest.importorskip("decord")
    third = decord.VideoReader(io.BytesIO((tmp_path / "clip.mp4").read_bytes()), num_threads=1)[5].asnumpy()
    assert colour_error(third) < 3.5


def test_a_clip_that_begins_between_key_frames(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", options={"g": "24", "bf": "2"}, frames=60)
    with av.open(str(source)) as given, av.open(str(tmp_path / "b.mp4"), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in list(given.demux(video=0))[10:]:
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    _, frames = cut_one(tmp_path / "b.mp4", tmp_path)
    seen = numbers(frames)
    assert seen == list(range(seen[0], 60))
    assert seen[0] in (10, 24)  # where the first key frame is, if nothing before it decodes
    assert shown(tmp_path / "b.mp4")[2] is None  # and its head does not promise more


def test_spans_are_exact_and_may_overlap(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", options={"bf": "3", "g": "50"}, frames=60)
    scan = scan_video(path, CONFIG)
    spans = [(0, 13), (5, 40), (39, 60), (59, 60)]
    cuts = [Cut(*span, tmp_path / f"{span}.mp4") for span in spans]
    written = cut_clips(path, scan.timeline, cuts, CONFIG)
    for cut in cuts:
        assert numbers(read_frames(cut.path.read_bytes())) == list(range(cut.start, cut.end))
        assert written[cut].fps == 12


def test_variable_rate_becomes_constant(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]  # the fourth frame stands four times as long
    scan, frames = cut_one(write(tmp_path / "a.mp4", times=times, frames=10), tmp_path)
    assert scan.timeline.rate == 12
    assert numbers(frames) == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8, 9]
    faster = CONFIG.model_copy(update={"fps": 24.0})
    _, frames = cut_one(tmp_path / "a.mp4", tmp_path, faster)
    assert numbers(frames)[:4] == [0, 0, 1, 1]


def test_a_real_variable_rate(tmp_path: Path) -> None:
    path = shared("videos/bunny_vfr.mp4")
    given = list(decode(path))
    scan, frames = cut_one(path, tmp_path)
    assert scan.timeline.frames == len(given) == 89
    for second in (1.0, 2.5, 4.0):
        expected = max(index for index, (when, _) in enumerate(given) if when <= second + 0.01)
        place = round(second * float(scan.timeline.rate))
        small = [cv2.resize(p, frames.shape[2:0:-1], interpolation=cv2.INTER_AREA).astype(int) for _, p in given]
        errors = [np.abs(frames[place] - picture).mean() for picture in small]
        assert int(np.argmin(errors)) == expected


def test_rotation_is_baked_in(tmp_path: Path) -> None:
    path = shared("videos/rotated_90.mov")
    _, frames = cut_one(path, tmp_path)
    _, theirs = cv2.VideoCapture(str(path)).read()  # OpenCV turns the picture itself
    theirs = cv2.resize(theirs[..., ::-1], frames.shape[2:0:-1], interpolation=cv2.INTER_AREA)
    assert np.abs(frames[0].astype(int) - theirs).mean() < 4


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_every_quarter_turn_of_a_display_matrix(tmp_path: Path, turns: int) -> None:
    path = write(tmp_path / "a.mp4", options={"crf": "1"}, frames=3)
    upright = list(decode(path))
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # the matrix of ISO 14496-12: a b u, c d v, x y w
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    one, unit = 1 << 16, 1 << 30
    values = [cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, unit]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(bytes(data))
    _, frames = cut_one(path, tmp_path)
    assert np.abs(frames[1] - np.rot90(upright[1][1], -turns).astype(int)).mean() < 3
    _, theirs = cv2.VideoCapture(str(path)).read()  # OpenCV turns the picture itself
    assert np.abs(frames[0] - theirs[..., ::-1].astype(int)).mean() < 6


def test_unordered_and_missing_timestamps_give_rising_times(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", options={"bf": "0"})
    with av.open(str(source)) as given, av.open(str(tmp_path / "b.ts"), "w", format="mpegts") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            if packet.dts is not None:
                packet.stream = stream
                if number == 7:
                    packet.pts = packet.dts = packet.dts + 40 * packet.duration if packet.duration else packet.dts
                try:
                    made.mux(packet)
                except av.FFmpegError:
                    continue  # the muxer refuses what comes before
    scan, frames = cut_one(tmp_path / "b.ts", tmp_path)
    assert (np.diff(scan.timeline.seconds) > 0).all()
    assert len(frames) > 0


@pytest.mark.parametrize(
    ("name", "about", "lasts"),
    [
        ("a.mp4", {"head": {"movflags": "faststart"}, "options": {"bf": "2"}}, 5),
        # Its fragments say how long they are, each for itself.
        ("fragments.mp4", {"head": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "12"}}, 4),
        ("a.avi", {"codec": "mpeg4"}, 5),
        ("h264.avi", {"options": {"bf": "2"}}, 5),
        ("a.mkv", {}, 5),
        ("a.flv", {}, 5),
    ],
)
def test_a_tail_that_is_lost_is_told(tmp_path: Path, name: str, about: dict, lasts: int) -> None:
    path = write(tmp_path / name, frames=60, **about)
    whole, _, error = shown(path)
    assert whole == list(range(60))
    assert error is None
    with av.open(str(path)) as container:
        places = sorted(packet.pos for packet in container.demux(video=0) if packet.pos)
    path.write_bytes(path.read_bytes()[: places[36] + 9])  # bytes, in the midst of a packet
    seen, found, error = shown(path)
    intact = [number for number, picture in zip(seen, found, strict=True) if picture.intact]
    assert 30 < len(intact) <= 37
    assert intact[:-2] == list(range(len(intact) - 2))  # one of the last may be built on one that is lost
    assert error is not None
    assert str(error) == f"truncated: decoded {error.decoded_s:.1f} of {lasts}.0 s"
    assert abs(error.decoded_s - len(seen) / 12) < 0.2


def test_frames_of_avi_are_shown_in_order_and_in_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.avi", options={"bf": "3", "g": "24"}, frames=60)  # its packets have no time of display
    seen, found, _ = shown(path)
    assert seen == list(range(60))
    assert [picture.seconds for picture in found] == pytest.approx([number / 12 for number in range(60)])
    scan, frames = cut_one(path, tmp_path)
    assert scan.timeline.constant
    assert numbers(frames) == list(range(60))


def test_a_size_that_changes_midway_is_a_cut(tmp_path: Path) -> None:
    sizes = [(128, 96), (96, 128), (128, 96)]
    parts = [write(tmp_path / f"{n}.ts", size=size, options={"bf": "0"}) for n, size in enumerate(sizes)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    scan = scan_video(path, CONFIG)
    assert scan.joints == (24, 48)
    assert scan.shots == [(0, 24), (24, 48), (48, 72)]
    cuts = [Cut(*span, tmp_path / f"{span}.mp4") for span in scan.shots]
    written = cut_clips(path, scan.timeline, cuts, CONFIG)
    assert [(written[cut].width, written[cut].height) for cut in cuts] == sizes
    for cut in cuts:
        assert numbers(read_frames(cut.path.read_bytes())) == list(range(24))


def test_a_full_disk_is_the_writers_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    scan = scan_video(path, CONFIG)
    with pytest.raises(OSError, match="No space left") as caught:
        cut_clips(path, scan.timeline, [Cut(0, 24, Path("/dev/full"))], CONFIG)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("between", ["0", "2"])
def test_flipped_bits_lose_the_damaged_frames_alone(tmp_path: Path, between: str) -> None:
    path = write(tmp_path / "a.mp4", options={"g": "12", "bf": between}, frames=60)
    clean = [picture.frame.to_ndarray(format="gray").astype(int) for picture in shown(path)[1]]
    data = bytearray(path.read_bytes())
    first = data.index(b"mdat")
    for place in range(first + (len(data) - first) // 3, first + (len(data) - first) // 3 + 300, 3):
        data[place] ^= 0x55
    path.write_bytes(bytes(data))
    scan = scan_video(path, CONFIG)
    clips, lost = find_clips(scan, CONFIG.model_copy(update={"trim_transitions": False}))
    assert 0 < (~scan.intact).sum() <= 24
    assert lost
    assert all(scan.intact[slice(*span)].all() for span in clips)
    assert sum(end - start for start, end in clips) > 30
    for picture in shown(path)[1]:
        if picture.intact:
            place = round(picture.seconds * 12)
            assert np.abs(picture.frame.to_ndarray(format="gray") - clean[place]).mean() < 1


def test_pixels_become_square_and_nothing_is_scaled_up() -> None:
    assert clip_size(128, 96, 512) == (128, 96)
    assert clip_size(1921, 1081, 540) == (960, 540)
    assert clip_size(63, 47, 512) == (62, 46)
    assert clip_size(720, 576, 576, Fraction(16, 15)) == (720, 540)  # wide pixels: fewer lines, no more columns
    assert clip_size(720, 480, 480, Fraction(8, 9)) == (640, 480)


@pytest.mark.parametrize(("number", "why"), [(0, "empty"), (1, "not a video"), (2, "unreadable")])
def test_what_is_no_video(tmp_path: Path, number: int, why: str) -> None:
    path = tmp_path / "x.mp4"
    match number:
        case 0:
            path.write_bytes(b"")
        case 1:
            cv2.imwrite(str(tmp_path / "x.png"), chart(0))
            (tmp_path / "x.png").rename(path)
        case 2:
            path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(VideoError, match=why):
        probe(path)
