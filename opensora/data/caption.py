"""The step `caption`: LLaVA describes every clip that came without a caption; captions are keyed by clip."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.config import CaptionConfig, ExecutorConfig
from opensora.data.executor import run_shards
from opensora.data.shards import read_clip
from opensora.data.video import read_frames
from opensora.data.workers import advance
from opensora.manifest import (
    GIVEN,
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
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report

if TYPE_CHECKING:
    import numpy as np

CUT_OFF = " […]"  # ends a caption that reached the token limit


@dataclass(frozen=True)
class Task:
    """One shard of clips to caption."""

    config: CaptionConfig
    inputs: Path  # part of the score step's manifest
    shards: Path  # folder of the split step
    model: Path
    part: Path


def run(
    config: CaptionConfig, inputs: Path, shards: Path, model: Path, output: Path, executor: ExecutorConfig
) -> Report:
    """Caption the kept clips of the score step in `inputs`.

    Args:
        shards: folder of the split step.
        model: folder of a LLaVA or LLaVA-NeXT model that Transformers loads.

    Raises:
        StepError: no clip has a caption in the end.
    """
    model_state = [(path.name, path.stat().st_size) for path in sorted(model.iterdir())]
    settings = config.model_dump(exclude={"workers", "threads"})
    folder = StepFolder(output, fingerprint(settings, manifest_hash(inputs), model_state))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    tasks = [Task(config, part, shards, model, work / part.name) for part in list_parts(inputs)]
    run_shards(caption_shard, tasks, executor, config.workers, "captioning", count_rows(inputs))
    tally, given = Tally(), 0
    for path in list_parts(work):
        clips = read_part(path)
        tally.add(clips)
        given += sum(clip.kept and clip.caption_model == GIVEN for clip in clips)
    if not tally.kept:
        raise StepError(f"no clip got a caption ({tally.reasons}); look at caption.max_new_tokens and the model")
    for path in work.glob("*.jsonl"):
        if path.name.startswith("captions"):
            path.unlink()
    metrics = {"given": float(given), "generated": float(tally.kept - given)}
    return folder.finish(
        Report("caption", total=tally.total, kept=tally.kept, dropped=dict(tally.dropped), metrics=metrics)
    )


def caption_shard(task: Task) -> None:
    """Caption the clips of one part that have no caption yet."""
    clips = read_part(task.inputs)
    lines = task.part.with_name(f"captions-{part_index(task.part):05d}.jsonl")
    known = _read_lines(lines)
    missing = [clip for clip in kept_clips(clips) if not clip.caption and clip.clip_id not in known]
    if missing:
        known |= _caption(missing, task.shards, _captioner(task.model, task.config), lines)
    write_part(task.part, [_with_caption(clip, known, task.model.name, task.config.prompt) for clip in clips])


_CAPTIONERS: dict[Path, "Captioner"] = {}  # a worker process loads its model once


def _captioner(model: Path, config: CaptionConfig) -> "Captioner":
    if model not in _CAPTIONERS:
        _CAPTIONERS[model] = Captioner(model, config)
    return _CAPTIONERS[model]


def _read_lines(path: Path) -> dict[str, str]:
    """Captions by clip id that a stopped run left; its last line may be torn."""
    known = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        known[row["clip_id"]] = row["caption"]
    return known


def _caption(clips: list[Clip], shards: Path, captioner: "Captioner", lines: Path) -> dict[str, str]:
    """Captions by clip id, each batch appended to `lines` as it is done."""
    size = captioner.config.batch_size
    known = {}
    with lines.open("a") as handle:
        for start in range(0, len(clips), size):
            batch = clips[start : start + size]
            frames = [pick_frames(read_clip(shards, clip), captioner.config.frame_positions) for clip in batch]
            for clip, caption in zip(batch, captioner(frames), strict=True):
                known[clip.clip_id] = caption
                handle.write(json.dumps({"clip_id": clip.clip_id, "caption": caption}) + "\n")
                advance()
            handle.flush()
    return known


def pick_frames(data: bytes, positions: tuple[float, ...]) -> "np.ndarray":
    """Frames uint8 [P, H, W, 3] of a clip at positions 0…1."""
    frames = read_frames(data)
    return frames[[min(len(frames) - 1, int(position * len(frames))) for position in positions]]


def _with_caption(clip: Clip, known: dict[str, str], model: str, prompt: str) -> Clip:
    if not clip.kept or clip.caption:
        return clip
    caption = known[clip.clip_id]
    clip = replace(clip, caption=caption, caption_model=model, caption_prompt=prompt)
    if caption.endswith(CUT_OFF):
        return replace(clip, kept=False, reason="caption cut off: raise caption.max_new_tokens")
    return clip if caption else replace(clip, kept=False, reason="caption empty")


class Captioner:
    """LLaVA through Transformers: a few frames of a clip in, one caption out."""

    def __init__(self, folder: Path, config: CaptionConfig) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(config.threads)
        self.processor: Any = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        self.processor.tokenizer.padding_side = "left"
        dtype = getattr(torch, config.dtype)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.model: Any = model.to(self.device).eval()

    def __call__(self, clips: "list[np.ndarray]") -> list[str]:
        """Captions of clips, each uint8 [P, H, W, 3]; one that reached the token limit ends with `CUT_OFF`."""
        import torch
        from PIL import Image

        images = [[Image.fromarray(frame) for frame in frames] for frames in clips]
        texts = [self._prompt(len(frames)) for frames in clips]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        tokenizer = self.processor.tokenizer
        captions = [" ".join(text.split()) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        ended = [tokenizer.eos_token_id in row.tolist() for row in new]
        return [text if end else text + CUT_OFF for text, end in zip(captions, ended, strict=True)]

    def _prompt(self, frames: int) -> str:
        if self.processor.chat_template is None:
            return "<image>" * frames + " " + self.config.prompt
        content = [{"type": "image"}] * frames + [{"type": "text", "text": self.config.prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
