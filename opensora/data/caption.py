"""The step `caption`: LLaVA describes every clip that came without a caption; captions are keyed by clip."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.config import CaptionConfig
from opensora.data.shards import read_clip
from opensora.data.video import read_frames
from opensora.manifest import GIVEN, Clip, drop_reasons, kept_clips, read_manifest, write_manifest
from opensora.progress import track
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report

if TYPE_CHECKING:
    import numpy as np

LINES = "captions.jsonl"
CUT_OFF = " […]"  # ends a caption that reached the token limit


def run(config: CaptionConfig, inputs: Path, shards: Path, model: Path, output: Path) -> Report:
    """Caption the kept clips of the score step in `inputs`.

    Args:
        shards: folder of the split step.
        model: folder of a LLaVA or LLaVA-NeXT model that Transformers loads.

    Raises:
        StepError: no clip has a caption in the end.
    """
    clips = read_manifest(inputs / "manifest.parquet")
    model_state = [(path.name, path.stat().st_size) for path in sorted(model.iterdir())]
    folder = StepFolder(output, fingerprint(config.model_dump(), [asdict(clip) for clip in clips], model_state))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    known = _read_lines(work / LINES)
    missing = [clip for clip in kept_clips(clips) if not clip.caption and clip.clip_id not in known]
    if missing:
        known |= _caption(missing, shards, Captioner(model, config), work / LINES)
    captioned = [_with_caption(clip, known, model.name, config.prompt) for clip in clips]
    write_manifest(work / "manifest.parquet", captioned)
    kept = kept_clips(captioned)
    dropped = drop_reasons(captioned)
    if not kept:
        raise StepError(f"no clip got a caption ({dropped}); look at caption.max_new_tokens and the model")
    (work / LINES).unlink(missing_ok=True)
    given = sum(clip.caption_model == GIVEN for clip in kept)
    metrics = {"given": float(given), "generated": float(len(kept) - given)}
    return folder.finish(Report("caption", total=len(clips), kept=len(kept), dropped=dropped, metrics=metrics))


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
    batches = [clips[start : start + size] for start in range(0, len(clips), size)]
    known = {}
    with lines.open("a") as handle:
        for batch in track(batches, len(batches), "captioning (batches)"):
            frames = [pick_frames(read_clip(shards, clip), captioner.config.frame_positions) for clip in batch]
            for clip, caption in zip(batch, captioner(frames), strict=True):
                known[clip.clip_id] = caption
                handle.write(json.dumps({"clip_id": clip.clip_id, "caption": caption}) + "\n")
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
