"""What must hold for one row of a manifest, for the bytes it points to, and for its latents."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config import DATA_STEPS
from opensora.data.shards import HEADER, latent_names, read_clip, text_key
from opensora.data.validation.problems import SHA256
from opensora.data.workers import call_isolated
from opensora.manifest import GIVEN, Clip
from opensora.step import STORE

HASH64 = re.compile(r"[0-9a-f]{16}")
MP4 = b"ftyp"  # bytes 4 to 8 of an mp4
TOLERANCE = 1.5  # frames: a clip of constant rate may start and end half a frame off its span
DECODE_S = 120.0  # seconds a clip
RATE = 0.001  # relative difference of two frame rates that are the same


def _reached(step: str, least: str) -> bool:
    return step in DATA_STEPS and DATA_STEPS.index(step) >= DATA_STEPS.index(least)


def row_rules(clip: Clip, step: str) -> Iterator[str]:
    """What is wrong with a row by itself.

    Args:
        step: that wrote it; empty checks what holds in every step.
    """
    for name in ("clip_id", "source", "licence"):
        if not getattr(clip, name).strip():
            yield f"{name} is empty" + ("; 'unknown' was expected where nothing is known" if name == "licence" else "")
    if clip.kept and clip.reason:
        yield f"kept, but has the reason {clip.reason!r}; only dropped rows have one"
    if not clip.kept and not clip.reason:
        yield "dropped without a reason"
    wrong = sorted(name for name, value in clip.scores.items() if not math.isfinite(value))
    if wrong:
        yield f"scores are not finite: {', '.join(f'{name} {clip.scores[name]}' for name in wrong)}"
    if not clip.kept:
        return
    if not SHA256.fullmatch(clip.source_sha256):
        yield f"source_sha256 is {clip.source_sha256!r}; 64 hexadecimal digits were expected"
    if clip.width <= 0 or clip.height <= 0:
        yield f"size is {clip.width}x{clip.height}; positive numbers were expected"
    if not (math.isfinite(clip.fps) and clip.fps > 0):
        yield f"fps is {clip.fps}; a positive number was expected"
    elif _reached(step, "split"):
        yield from _span_rules(clip)
    if _reached(step, "score"):
        if not clip.scores:
            yield "no scores, though it was kept by the step score"
        if clip.perceptual_hash and not HASH64.fullmatch(clip.perceptual_hash):  # one colour has none
            yield f"perceptual_hash is {clip.perceptual_hash!r}; 16 hexadecimal digits were expected"
    if _reached(step, "caption"):
        yield from _caption_rules(clip)
    if _reached(step, "encode"):
        yield from (f"{name} is empty" for name in ("latent_shard", "text_shard") if not getattr(clip, name))


def _span_rules(clip: Clip) -> Iterator[str]:
    if not 0 <= clip.start_s < clip.end_s:
        yield f"span is {clip.start_s:g} to {clip.end_s:g} s; 0 ≤ start < end was expected"
    if not 0 <= clip.start_frame < clip.end_frame:
        yield f"span is frames {clip.start_frame} to {clip.end_frame} of the source; 0 ≤ start < end was expected"
    expected = (clip.end_s - clip.start_s) * clip.fps
    if clip.frames <= 0 or abs(clip.frames - expected) > TOLERANCE:
        yield (
            f"{clip.frames} frames; {clip.end_s - clip.start_s:.3f} s at {clip.fps:g} fps are {expected:.1f}, "
            f"and {TOLERANCE:g} more or less are accepted"
        )
    if clip.width % 2 or clip.height % 2:
        yield f"size is {clip.width}x{clip.height}; even numbers were expected"
    if not clip.shard or clip.offset < HEADER or clip.size <= 0:
        yield f"place of its bytes is {clip.shard!r}, offset {clip.offset}, size {clip.size}; run `opensora split`"


def _caption_rules(clip: Clip) -> Iterator[str]:
    if not clip.caption.strip():
        yield "caption is empty, though it was kept by the step caption"
    elif not clip.caption_model:
        yield f"caption_model is empty; the model's name or {GIVEN!r} was expected"
    elif clip.caption_model != GIVEN and not clip.caption_prompt:
        yield f"caption_prompt is empty, though {clip.caption_model} wrote the caption"


def files_of(clip: Clip, step: str, folder: Path, shards: Path, said: set[str]) -> Iterator[str]:
    """Files that a row names and that are not there; each is told once.

    Args:
        folder: of the step. shards: of the split step.
        said: names of the files that were told, which grows.
    """
    files = [(shards, clip.shard, "split")]
    if step == "download" and clip.kept:
        # Nobody versions the fetched videos: where none is left, that is one problem, and only `split` needs them.
        there = Path(clip.path).is_absolute() or (folder.parent / STORE).is_dir()
        files.append((folder.parent, clip.path if there else STORE, "download"))
    if step == "encode":
        files += [(folder, clip.latent_shard, "encode"), (folder, clip.text_shard, "encode")]
    for place, name, maker in files:
        if name and name not in said and not (place / name).exists():
            said.add(name)
            yield f"{name} is missing in {place}; run `opensora {maker}` again"


def clip_in_shard(clip: Clip, shards: Path) -> Iterator[str]:
    """Whether the tar member of this clip, an mp4, lies where the row says."""
    path = shards / clip.shard
    if not path.is_file():
        return
    with path.open("rb") as handle:
        size = handle.seek(0, 2)
        if clip.offset + clip.size > size:
            yield f"bytes to {clip.offset + clip.size:,} of {clip.shard} were expected, which has {size:,}"
            return
        handle.seek(clip.offset - HEADER)
        head = handle.read(HEADER + 8)
    member = head[:100].rstrip(b"\0").decode("utf-8", "replace")
    if member != f"{clip.clip_id}.mp4":
        yield f"{clip.shard} has {member!r} at byte {clip.offset:,}; {clip.clip_id}.mp4 was expected"
    elif head[HEADER + 4 :] != MP4:
        yield f"the bytes at {clip.offset:,} of {clip.shard} are no mp4"


@dataclass(frozen=True)
class Task:
    """One clip, or the video of one, to decode to its end."""

    clip: Clip
    shards: Path  # folder of the split step
    video: Path | None  # the file of a row before `split`


@dataclass(frozen=True)
class Decoded:
    """What a decoder found."""

    frames: int
    width: int
    height: int
    fps: float


def decoded(clip: Clip, step: str, folder: Path, shards: Path) -> Iterator[str]:
    """Decode a clip to its end, in a process that it may crash, and compare what comes out with the row."""
    if step == "download" and not (folder.parent / clip.path).is_file():
        return
    video = folder.parent / clip.path if step == "download" else None
    outcome = call_isolated(decode_clip, Task(clip, shards, video), DECODE_S)
    if outcome.value is None:
        yield f"does not decode: {outcome.failure}"
        return
    found = outcome.value
    if video is None and found.frames != clip.frames:
        yield f"{found.frames} frames decode, the row says {clip.frames}"
    if (found.width, found.height) != (clip.width, clip.height):
        yield f"frames are {found.width}x{found.height}, the row says {clip.width}x{clip.height}"
    if video is None and abs(found.fps - clip.fps) > RATE * clip.fps:
        yield f"the rate is {found.fps:g} fps, the row says {clip.fps:g}"


def decode_clip(task: Task) -> Decoded:
    """Decode all frames; the rate is that of the container."""
    import io

    import av

    from opensora.data.video import decode, probe

    if task.video is not None:
        about = probe(task.video)
        frames = sum(1 for _ in decode(task.video))
        return Decoded(frames, about.width, about.height, about.fps)
    with av.open(io.BytesIO(read_clip(task.shards, task.clip)), "r") as container:
        stream = container.streams.video[0]
        shapes = [(frame.width, frame.height) for frame in container.decode(stream)]
        return Decoded(len(shapes), *shapes[0], float(stream.average_rate or 0))


def latents(clips: list[Clip], folder: Path, deep: bool) -> Iterator[tuple[int, Clip, str]]:
    """(row, clip, what is wrong) of the latents and text embeddings of one part."""
    files: dict[str, Any] = {}
    for row, clip in enumerate(clips, start=1):
        if not clip.kept or not clip.latent_shard or not clip.text_shard:
            continue
        for name in (clip.latent_shard, clip.text_shard):
            if name not in files:
                files[name] = _open_tensors(folder / name)
                if files[name] and isinstance(files[name], str):
                    yield row, clip, files[name]
        held, texts = files[clip.latent_shard], files[clip.text_shard]
        if not isinstance(texts, str):
            yield from ((row, clip, what) for what in _text(clip, texts, deep))
        if not isinstance(held, str):
            yield from ((row, clip, what) for what in _latent(clip, held, deep))


@dataclass(frozen=True)
class Tensors:
    """A safetensors file: its names, and the sizes in pixels of the clips that it holds."""

    file: Any
    names: frozenset[str]
    sizes: frozenset[tuple[int, int]]


SIZE = re.compile(r"[^/]+/(\d+)x(\d+)/(?:mean|std)")


def _open_tensors(path: Path) -> "Tensors | str":
    """The open file, or what is wrong with it; nothing for one that is missing, which was told."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except FileNotFoundError:
        return ""
    except (OSError, SafetensorError) as error:
        return f"{path.name} is damaged ({error}); run `opensora encode` again"
    names = frozenset(file.keys())
    sizes = {(int(match[1]), int(match[2])) for match in map(SIZE.fullmatch, names) if match}
    return Tensors(file, names, frozenset(sizes))


def _text(clip: Clip, tensors: Tensors, deep: bool) -> Iterator[str]:
    name = text_key(clip.caption)
    if name not in tensors.names:
        yield f"{clip.text_shard} has no text embedding {name}, that of the caption"
        return
    shape = tensors.file.get_slice(name).get_shape()
    if len(shape) != 2 or not shape[0]:
        yield f"text embedding {name} is {shape}; [tokens, channels] was expected"
    elif deep and not bool(tensors.file.get_tensor(name).isfinite().all()):
        yield f"text embedding {name} is not finite"


def _latent(clip: Clip, tensors: Tensors, deep: bool) -> Iterator[str]:
    if not tensors.sizes:
        yield f"{clip.latent_shard} holds no latents"
    for height, width in sorted(tensors.sizes):
        names = latent_names(clip.clip_id, height, width)
        missing = [name for name in names if name not in tensors.names]
        if missing:
            yield f"{clip.latent_shard} has no {', '.join(missing)}"
            continue
        shapes = [tensors.file.get_slice(name).get_shape() for name in names]
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][0] != clip.frames:
            yield f"latents {names[0]} are {shapes[0]}, {shapes[1]}; [{clip.frames}, C, h, w] was expected of both"
        elif deep:
            wrong = [name for name in names if not bool(tensors.file.get_tensor(name).isfinite().all())]
            yield from (f"latents {name} are not finite" for name in wrong)
