"""The step `encode`: VAE latents of all frames and text embeddings, in safetensors shards read by key."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from opensora.config import EncodeConfig, ExecutorConfig
from opensora.data.executor import run_shards
from opensora.data.shards import read_clip
from opensora.data.video import read_frames, resize_cover
from opensora.data.workers import advance
from opensora.manifest import (
    Clip,
    Tally,
    count_rows,
    kept_clips,
    list_parts,
    manifest_hash,
    part_index,
    read_part,
    write_part,
)
from opensora.step import Report, StepFolder, fingerprint, read_report

LATENT_BYTES = 2 * 2 * 4  # mean and deviation, fp16, four channels


@dataclass(frozen=True)
class Task:
    """One shard of clips to encode."""

    config: EncodeConfig
    inputs: Path  # part of the caption step's manifest
    shards: Path  # folder of the split step
    vae: Path
    text: Path
    part: Path


def run(
    config: EncodeConfig, inputs: Path, shards: Path, vae: Path, text: Path, output: Path, executor: ExecutorConfig
) -> Report:
    """Encode the kept clips of the caption step in `inputs`.

    Files `latents-00003-00.safetensors`, … of part 3 hold, a clip: `<clip_id>/<h>x<w>/mean` and `…/std`
    [T, 4, h/s, w/s] and `<clip_id>/text` [L, Cc], all fp16.

    Args:
        shards: folder of the split step.
        vae, text: folders of the VAE and of the T5.

    Raises:
        StepError: a shard could not be encoded.
    """
    models = [(path.name, path.stat().st_size) for folder in (vae, text) for path in sorted(folder.iterdir())]
    settings = config.model_dump(exclude={"workers", "threads"})
    folder = StepFolder(output, fingerprint(settings, manifest_hash(inputs), models))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    tasks = [Task(config, part, shards, vae, text, work / part.name) for part in list_parts(inputs)]
    run_shards(encode_shard, tasks, executor, config.workers, "encoding", count_rows(inputs))
    tally = Tally()
    for path in list_parts(work):
        tally.add(read_part(path))
    return folder.finish(Report("encode", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped)))


def encode_shard(task: Task) -> None:
    """Encode the kept clips of one part."""
    clips = read_part(task.inputs)
    places: dict[str, str] = {}
    for number, group in enumerate(group_clips(kept_clips(clips), task.config)):
        path = task.part.with_name(f"latents-{part_index(task.part):05d}-{number:02d}.safetensors")
        _encode_group(group, task, path)
        places |= {clip.clip_id: path.name for clip in group}
    write_part(task.part, [replace(clip, latent_shard=places.get(clip.clip_id, "")) for clip in clips])


def group_clips(clips: list[Clip], config: EncodeConfig) -> list[list[Clip]]:
    """Clips by shard: filled up to `shard_mib`, estimated for latents eight times smaller than the frames."""
    groups: list[list[Clip]] = []
    room = 0.0
    for clip in clips:
        size = sum(clip.frames * height * width / 64 * LATENT_BYTES for height, width in config.sizes)
        if room < size or not groups:
            groups.append([])
            room = float(config.shard_mib << 20)
        groups[-1].append(clip)
        room -= size
    return groups


_MODELS: dict[tuple[Path, Path], tuple] = {}  # a worker process loads its models once


def _encode_group(clips: list[Clip], task: Task, path: Path) -> None:
    from safetensors.torch import save_file

    config = task.config
    vae, encoder = _models(config, task.vae, task.text)
    tensors = {}
    for clip in clips:
        frames = read_frames(read_clip(task.shards, clip))
        for height, width in config.sizes:
            mean, deviation = vae.encode(resize_cover(frames, height, width), config.batch_frames)
            tensors[f"{clip.clip_id}/{height}x{width}/mean"] = mean.half().contiguous()
            tensors[f"{clip.clip_id}/{height}x{width}/std"] = deviation.half().contiguous()
        advance()
    texts = sorted({clip.caption for clip in clips})
    embeddings, mask = encoder.encode(texts, config.max_tokens)
    by_text = {text: embeddings[index, : int(mask[index].sum())] for index, text in enumerate(texts)}
    for clip in clips:
        tensors[f"{clip.clip_id}/text"] = by_text[clip.caption].half().clone()
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.rename(path)


def _models(config: EncodeConfig, vae: Path, text: Path) -> tuple:
    import torch

    from opensora.models.text import TextEncoder
    from opensora.models.vae import FrameVAE

    if (vae, text) not in _MODELS:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(config.threads)
        dtype = getattr(torch, config.dtype)
        _MODELS[vae, text] = FrameVAE(vae, device, dtype), TextEncoder(text, device, dtype)
    return _MODELS[vae, text]
