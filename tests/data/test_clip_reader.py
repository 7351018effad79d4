"""Reading clips: training sees exactly the pixels that the encode step sees, and a broken clip is an error."""

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from opensora.data.clip_reader import ClipError, cover_size, read_crop, scaled_frames
from tests.data.made_clips import encode

SIZES = [(64, 96), (32, 32), (48, 20), (96, 144)]  # as it is, cut at the sides, at top and bottom, scaled up


@pytest.fixture(scope="module")
def clip() -> bytes:
    """70 frames, over three key frames, that all differ."""
    random = np.random.default_rng(0)
    still = random.integers(0, 256, (64, 96, 3), np.uint8)
    return encode([np.roll(still, 3 * number, 1) for number in range(70)])[0]


@pytest.fixture(scope="module")
def reordered() -> bytes:
    """As `clip`, with B-frames: the order of decoding is not that of showing."""
    buffer, random = io.BytesIO(), np.random.default_rng(1)
    still = random.integers(0, 256, (64, 96, 3), np.uint8)
    with av.open(buffer, "w", format="mp4") as container:
        options = {"bf": "3", "g": "30", "x264-params": "log=0"}
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(70):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(still, 2 * number, 0), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["clip", "reordered"])
def test_a_crop_is_exactly_those_frames_of_the_whole(name: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(name)
    whole = [np.stack(frames) for frames in zip(*scaled_frames(data, SIZES), strict=True)]
    assert [frames.shape for frames in whole] == [(70, *size, 3) for size in SIZES]
    assert len({frame.tobytes() for frame in whole[0]}) == 70
    for indices in (range(1), range(70), range(0, 70, 3), range(29, 32), range(31, 60, 4), range(69, 70)):
        for size, frames in zip(SIZES, whole, strict=True):
            assert np.array_equal(read_crop(data, indices, size), frames[indices.start : indices.stop : indices.step])


def test_frames_are_scaled_to_cover_the_size() -> None:
    assert cover_size((480, 854), (256, 256)) == (256, 455)
    assert cover_size((854, 480), (256, 256)) == (455, 256)
    assert cover_size((480, 854), (512, 910)) == (512, 911)


def test_a_clip_that_does_not_decode_is_an_error(clip: bytes) -> None:
    with pytest.raises(ClipError, match="it has 70 frames, and number 70 was asked for"):
        read_crop(clip, range(60, 71, 2), (32, 32))
    for broken in (b"", b"no video at all", clip[: len(clip) // 2]):
        with pytest.raises(ClipError):
            read_crop(broken, range(3), (32, 32))
        with pytest.raises(ClipError):
            list(scaled_frames(broken, [(32, 32)]))


def test_a_file_without_a_video_is_an_error(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    data = (tmp_path / "sound.wav").read_bytes()
    for read in (lambda: read_crop(data, range(1), (8, 8)), lambda: list(scaled_frames(data, [(8, 8)]))):
        with pytest.raises(ClipError, match="it holds no video"):
            read()
