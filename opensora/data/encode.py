"""The step `encode`: VAE latents of all frames and text embeddings, in safetensors shards read by key."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from opensora.config import EncodeConfig, ExecutorConfig
from opensora.data.clip_reader import ClipError, scaled_frames
from opensora.data.executor import run_shards
from opensora.data.gpu import process_device
from opensora.data.keyed_files import KeyedFiles, Unusable
from opensora.data.reuse import Keeper, hash_folder
from opensora.data.shards import latent_names, read_clip, text_key
from opensora.data.workers import advance
from opensora.manifest import (
    Clip,
    Tally,
    count_rows,
    kept_clips,
    list_parts,
    manifest_hash,
    read_part,
    write_part,
)
from opensora.step import CACHE, Report, StepError, StepFolder, fingerprint, read_report

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from opensora.models.text import TextEncoder
    from opensora.models.vae import FrameVAE

Model = TypeVar("Model")
CHUNK = 64  # frames decoded at once, at least: a clip of any length takes the same memory
STORED_BYTES = 2  # a number, in either of encode.store_dtype


@dataclass(frozen=True)
class Task:
    """One shard of clips to encode."""

    config: EncodeConfig
    inputs: Path  # part of the caption step's manifest
    shards: Path  # folder of the split step
    vae: Path
    text: Path
    latents: Path  # folders of what was encoded before; they may be absent
    texts: Path
    part: Path


def run(
    config: EncodeConfig, inputs: Path, shards: Path, vae: Path, text: Path, output: Path, executor: ExecutorConfig
) -> Report:
    """Encode the kept clips of the caption step in `inputs`.

    Files `latents-00003-00.safetensors`, … of part 3 hold, a clip and size, `<clip_id>/<h>x<w>/mean` and `…/std`
    [T, C, h/s, w/s]; `text-00003-00.safetensors`, … hold the embeddings [L, Cc] of the part's captions, each under
    `text_key`. What a file holds follows from the part and the models alone, whoever wrote it and whatever was there
    before. The last run's files, and what a stopped one had finished, outlive it in `.cache` beside `output`: what they
    hold is not encoded again, as long as the weights, sizes, dtypes and max_tokens that made it are the same.

    Args:
        shards: folder of the split step.
        vae, text: folders of the VAE and of the T5.

    Raises:
        StepError: a shard could not be encoded, or nothing is left.
    """
    store = output.parent / CACHE
    dtypes = [config.dtype, config.store_dtype]
    latent_key = fingerprint(hash_folder(vae, store), config.sizes, dtypes)[:16]
    words_key = fingerprint(hash_folder(text, store), config.max_tokens, dtypes)[:16]
    latents, texts = store / f"latents-{latent_key}", store / f"text-{words_key}"
    settings = config.model_dump(exclude={"workers", "threads"})
    folder = StepFolder(output, fingerprint(settings, manifest_hash(inputs), latent_key, words_key))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    tasks = [Task(config, part, shards, vae, text, latents, texts, work / part.name) for part in list_parts(inputs)]
    run_shards(encode_shard, tasks, executor, config.workers, "encoding", count_rows(inputs))
    tally = Tally()
    with Keeper(latents) as keep_latents, Keeper(texts) as keep_texts:
        for path in list_parts(work):
            clips = read_part(path)
            tally.add(clips)
            keep_latents.add(work, [(clip.clip_id, clip.latent_shard) for clip in kept_clips(clips)])
            keep_texts.add(work, [(text_key(clip.caption), clip.text_shard) for clip in kept_clips(clips)])
        if not tally.kept:
            raise StepError(f"no clip could be encoded ({tally.reasons}); look at the reasons in {work}")
    return folder.finish(Report("encode", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped)))


def encode_shard(task: Task) -> None:
    """Encode the kept clips of one part, and their captions."""
    clips = read_part(task.inputs)
    by_id = {clip.clip_id: clip for clip in kept_clips(clips)}
    for _ in range(len(clips) - len(by_id)):
        advance()
    _set_threads(task.config.threads)
    places, reasons = _encode_latents(by_id, task)
    captions = {text_key(clip.caption): clip.caption for clip in by_id.values() if clip.clip_id in places}
    text_places, text_reasons = _encode_texts(captions, task)

    def finished(clip: Clip) -> Clip:
        if not clip.kept:
            return clip
        key = text_key(clip.caption)
        reason = reasons.get(clip.clip_id) or text_reasons.get(key)
        if reason:
            return replace(clip, kept=False, reason=reason)
        return replace(clip, latent_shard=places[clip.clip_id], text_shard=text_places[key])

    write_part(task.part, [finished(clip) for clip in clips])


def _encode_latents(clips: dict[str, Clip], task: Task) -> tuple[dict[str, str], dict[str, str]]:
    """Write the files of latents; returns the file of every clip, and the reasons of those that have none."""
    sizes = task.config.sizes
    pixels = sum(height * width for height, width in sizes)
    channels, scale = _vae_shape(task.vae)
    frame_bytes = 2 * channels * pixels / scale**2 * STORED_BYTES  # mean and deviation
    files = KeyedFiles(
        names=lambda clip_id: [name for size in sizes for name in latent_names(clip_id, *size)],
        make=lambda clip_id: encode_clip(read_clip(task.shards, clips[clip_id]), clips[clip_id], task),
        size=lambda clip_id: clips[clip_id].frames * frame_bytes,
    )
    return files.write(list(clips), "latents", task.part, task.config.shard_mib << 20, task.latents, advance)


def _encode_texts(captions: dict[str, str], task: Task) -> tuple[dict[str, str], dict[str, str]]:
    """Write the files of embeddings; returns the file of every text key, and the reasons of those that have none."""
    text_bytes = task.config.max_tokens * _text_width(task.text) * STORED_BYTES  # at most
    files = KeyedFiles(
        names=lambda key: [key],
        make=lambda key: {key: encode_text(captions[key], task)},
        size=lambda key: text_bytes,
    )
    return files.write(sorted(captions), "text", task.part, task.config.shard_mib << 20, task.texts)


def encode_clip(data: bytes, clip: Clip, task: Task) -> "dict[str, Tensor]":
    """Means and deviations of all frames at all sizes, by name; a clip's alone, so that no other changes them.

    Raises:
        Unusable: it does not decode to the frames that the manifest says, or a number is not finite as stored.
    """
    import torch

    config = task.config
    vae = _vae(task)
    parts: dict[str, list[Tensor]] = {}
    frames = 0
    try:
        for chunk in _chunks(scaled_frames(data, config.sizes), max(CHUNK, config.batch_frames or 0)):
            frames += len(chunk[0])
            for size, pixels in zip(config.sizes, chunk, strict=True):
                moments = vae.encode(pixels, config.batch_frames)
                for name, tensor in zip(latent_names(clip.clip_id, *size), moments, strict=True):
                    parts.setdefault(name, []).append(_stored(tensor, config, "latents"))
    except ClipError as error:
        raise Unusable(f"unreadable: {error}") from error
    if frames != clip.frames or not frames:
        raise Unusable(f"unreadable: {frames} of {clip.frames} frames decode")
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _chunks(frames: "Iterator[list[np.ndarray]]", count: int) -> "Iterator[list[np.ndarray]]":
    """Up to `count` frames at a time, uint8 [M, height, width, 3] at each size."""
    import numpy as np

    waiting: list[list[np.ndarray]] = []
    for made in frames:
        waiting.append(made)
        if len(waiting) == count:
            yield [np.stack(same) for same in zip(*waiting, strict=True)]
            waiting = []
    if waiting:
        yield [np.stack(same) for same in zip(*waiting, strict=True)]


def encode_text(caption: str, task: Task) -> "Tensor":
    """The embeddings [L, Cc] of a caption's tokens.

    Texts go in one by one: the sum that makes an embedding is then the same whatever stands beside it, and T5-XXL at
    120 tokens keeps a GPU about as busy as a batch would; beside the VAE's its time is next to nothing.

    Raises:
        Unusable: a number is not finite as stored.
    """
    embeddings, mask = _text_encoder(task).encode([caption], task.config.max_tokens)
    return _stored(embeddings[0, : int(mask[0].sum())], task.config, "text")


def _stored(tensor: "Tensor", config: EncodeConfig, what: str) -> "Tensor":
    import torch

    stored = tensor.to(getattr(torch, config.store_dtype))
    if not torch.isfinite(stored).all():
        largest = float(tensor.abs().nan_to_num(float("nan")).max())
        raise Unusable(f"not finite: {what} up to {largest:g} in {config.store_dtype}; encode.store_dtype or dtype")
    return stored


def _vae_shape(folder: Path) -> tuple[int, int]:
    """Latent channels and pixels a latent, without loading the weights."""
    config = json.loads((folder / "config.json").read_text())
    return int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)


def _text_width(folder: Path) -> int:
    """Channels of an embedding, without loading the weights."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("d_model") or config.get("text_config", config)["hidden_size"])


_MODELS: dict[tuple[Path, str], object] = {}  # a worker process loads each model once, and only one that it needs


def _vae(task: Task) -> "FrameVAE":
    from opensora.models.vae import FrameVAE

    return _loaded(FrameVAE, task.vae, task.config.dtype)


def _text_encoder(task: Task) -> "TextEncoder":
    from opensora.models.text import TextEncoder

    return _loaded(TextEncoder, task.text, task.config.dtype)


def _loaded(kind: "Callable[[Path, str, torch.dtype], Model]", folder: Path, dtype: str) -> "Model":
    import torch

    if (folder, dtype) not in _MODELS:
        _MODELS[folder, dtype] = kind(folder, process_device(), getattr(torch, dtype))
    return cast("Model", _MODELS[folder, dtype])


def _set_threads(threads: int) -> None:
    """In every shard, not once: the number of threads can change the last bits of a sum."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
