"""The step `encode`: VAE latents of all frames and text embeddings, in safetensors shards read by key."""

import os
from dataclasses import asdict, replace
from pathlib import Path

from opensora.config import EncodeConfig
from opensora.data.executor import run_tasks
from opensora.data.shards import read_clip
from opensora.data.video import read_frames, resize_cover
from opensora.manifest import Clip, drop_reasons, kept_clips, read_manifest, write_manifest
from opensora.progress import track
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report

TIMEOUT_S = 24 * 3600.0  # a shard
LATENT_BYTES = 2 * 2 * 4  # mean and deviation, fp16, four channels


def run(config: EncodeConfig, inputs: Path, shards: Path, vae: Path, text: Path, output: Path) -> Report:
    """Encode the kept clips of the caption step in `inputs`.

    Shards `latents-00000.safetensors`, … hold, a clip: `<clip_id>/<h>x<w>/mean` and `…/std` [T, 4, h/s, w/s] and
    `<clip_id>/text` [L, Cc], all fp16. A stopped run goes on with the next shard.

    Args:
        shards: folder of the split step.
        vae, text: folders of the VAE and of the T5.

    Raises:
        StepError: a shard could not be encoded.
    """
    clips = read_manifest(inputs / "manifest.parquet")
    models = [(path.name, path.stat().st_size) for folder in (vae, text) for path in sorted(folder.iterdir())]
    folder = StepFolder(output, fingerprint(config.model_dump(), [asdict(clip) for clip in clips], models))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    groups = group_clips(kept_clips(clips), config)
    tasks = [
        (config, group, shards, vae, text, work / f"latents-{index:05d}.safetensors")
        for index, group in enumerate(groups)
    ]
    left = [task for task in tasks if not task[-1].is_file()]
    outcomes = run_tasks(encode_shard, left, config.workers, TIMEOUT_S)
    for outcome in track(outcomes, len(left), "encoding shards"):
        if outcome.failure:
            raise StepError(f"encoding {left[outcome.index][-1].name} failed: {outcome.failure}")
    places = {clip.clip_id: task[-1].name for task in tasks for clip in task[1]}
    rows = [replace(clip, latent_shard=places.get(clip.clip_id, "")) for clip in clips]
    write_manifest(work / "manifest.parquet", rows)
    kept = kept_clips(rows)
    return folder.finish(Report("encode", total=len(rows), kept=len(kept), dropped=drop_reasons(rows)))


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


def encode_shard(task: tuple[EncodeConfig, list[Clip], Path, Path, Path, Path]) -> int:
    """Encode one group of clips into one shard; returns how many."""
    from safetensors.torch import save_file

    config, clips, shards, vae_folder, text_folder, path = task
    vae, encoder = _models(config, vae_folder, text_folder)
    tensors = {}
    for clip in clips:
        frames = read_frames(read_clip(shards, clip))
        for height, width in config.sizes:
            mean, deviation = vae.encode(resize_cover(frames, height, width), config.batch_frames)
            tensors[f"{clip.clip_id}/{height}x{width}/mean"] = mean.half().contiguous()
            tensors[f"{clip.clip_id}/{height}x{width}/std"] = deviation.half().contiguous()
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
    return len(clips)


def _models(config: EncodeConfig, vae: Path, text: Path) -> tuple:
    import torch

    from opensora.models.text import TextEncoder
    from opensora.models.vae import FrameVAE

    if (vae, text) not in _MODELS:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        dtype = getattr(torch, config.dtype)
        _MODELS[vae, text] = FrameVAE(vae, device, dtype), TextEncoder(text, device, dtype)
    return _MODELS[vae, text]
