"""The step `demo_models`: a tiny VAE and a tiny LLaVA trained side by side, and a tiny frozen T5."""

import multiprocessing
import os
from pathlib import Path

import numpy as np

from opensora.config import Config
from opensora.manifest import GIVEN, Clip, kept_clips, read_manifest
from opensora.process import shielded
from opensora.progress import plain_lines
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report

VAE_FRAMES = 2400  # frames the VAE learns from
RENDERED = 400  # clips to learn captions from when the videos came without any
FRAME_SIZE = 32  # pixels of the frames LLaVA sees


def run(config: Config, score: Path, split: Path, output: Path) -> Report:
    """Train the models on the kept clips of `score` and save them as folders `vae`, `t5` and `llava`.

    Raises:
        StepError: a model could not be trained.
    """
    key = fingerprint(config.demo.model_dump(), config.caption.prompt, read_report(score).metrics)
    folder = StepFolder(output, key)
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    clips = kept_clips(read_manifest(score))
    _make_text_encoder(work, config)
    jobs = {"vae": _train_vae, "llava": _train_llava}
    # Neither fills two cores, so each gets one.
    context = multiprocessing.get_context("spawn")
    processes = {
        name: context.Process(target=job, args=(work, config, clips, split), name=name, daemon=True)
        for name, job in jobs.items()
        if not (work / name).is_dir()
    }
    with shielded():
        for process in processes.values():
            process.start()
    for process in processes.values():
        process.join()
    failed = [name for name, process in processes.items() if process.exitcode]
    if failed:
        raise StepError(f"training of {' and '.join(failed)} failed; the lines above say why")
    return folder.finish(Report("demo_models", total=len(clips), kept=len(clips)))


def _make_text_encoder(work: Path, config: Config) -> None:
    from opensora.demo.shapes import all_scenes
    from opensora.demo.text_encoder import build_text_encoder

    words = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    build_text_encoder(work / config.encode.text_encoder, words, seed=0)


def _train_vae(work: Path, config: Config, clips: list[Clip], split: Path) -> None:
    import torch

    from opensora.demo.autoencoder import train_vae

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    chosen = [clips[index] for index in rng.permutation(len(clips))]
    frames = np.concatenate([_frames(clip, split, config.demo.size, 4) for clip in chosen[: VAE_FRAMES // 4]])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    steps = config.demo.vae_steps
    vae = train_vae(pixels, steps=steps, seed=0, progress=plain_lines("training the VAE", steps))
    _save(vae.save_pretrained, work / config.encode.vae)


def _train_llava(work: Path, config: Config, clips: list[Clip], split: Path) -> None:
    import torch

    from opensora.demo.captioner import train_llava
    from opensora.demo.shapes import all_scenes, held_out_scenes, render_clip

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    given = [clip for clip in clips if clip.caption_model == GIVEN and not config.download.source]
    if given:
        pairs = [(_frames(clip, split, FRAME_SIZE, 3), clip.caption) for clip in given]
    else:
        # Videos from elsewhere: LLaVA learns the embedded world's few words, and says so of any clip.
        scenes = [scene for scene in all_scenes() if scene not in held_out_scenes()]
        chosen = [scenes[index] for index in rng.integers(len(scenes), size=RENDERED)]
        pairs = [(render_clip(scene, 16, FRAME_SIZE, rng)[[3, 8, 12]], scene.caption) for scene in chosen]

    def save(part: Path) -> None:
        steps, say = config.demo.llava_steps, plain_lines("training LLaVA", config.demo.llava_steps)
        train_llava(part, pairs, prompt=config.caption.prompt, steps=steps, seed=0, progress=say)

    _save(save, work / config.caption.model)


def _frames(clip: Clip, split: Path, size: int, count: int) -> np.ndarray:
    """`count` frames at equal distances, uint8 [count, size, size, 3]; three are at 20, 50 and 80 %."""
    from opensora.data.shards import read_clip
    from opensora.data.video import read_frames_at

    positions = [0.2, 0.5, 0.8] if count == 3 else list(np.linspace(0.05, 0.95, count))
    return read_frames_at(read_clip(split, clip), positions, size)


def _save(save: object, folder: Path) -> None:
    """Call `save(part)` and rename, so that a model folder is whole or absent."""
    part = folder.with_name(folder.name + ".part")
    save(part)  # type: ignore[operator]
    os.rename(part, folder)
