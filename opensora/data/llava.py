"""LLaVA and LLaVA-NeXT in this process, through Transformers: batches of clips, one GPU a process."""

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.config import CaptionConfig
from opensora.data.answers import Answer
from opensora.data.gpu import process_device
from opensora.step import StepError

if TYPE_CHECKING:
    import numpy as np

    from opensora.data.answers import Question


class Llava:
    """A folder with a model and its processor: a few frames of a clip in, one caption out.

    Any model of Transformers' image-text-to-text kind loads whose image processor works on PIL pictures.
    """

    def __init__(self, folder: Path, config: CaptionConfig) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.config = config
        self.batch_size = config.batch_size
        self.ahead = config.batch_size
        self.device = process_device()
        if self.device == "cpu":
            torch.set_num_threads(config.threads)
        self.processor: Any = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        self.processor.tokenizer.padding_side = "left"
        self._decoder = copy.deepcopy(self.processor.tokenizer)  # the other one is at work in another thread
        dtype = getattr(torch, config.dtype)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.model: Any = model.to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        self._ends = {self._decoder.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    def ask(self, questions: "Iterable[Question]", attempt: int, record: Callable[[str, Answer], None]) -> None:
        """Ask batch by batch, the next one prepared while the model works; see `answers.Backend`."""
        source = iter(questions)
        with ThreadPoolExecutor(1) as pool:
            batch = list(islice(source, self.batch_size))
            inputs = pool.submit(self._prepare, batch)
            while batch:
                following = list(islice(source, self.batch_size))
                ready, inputs = inputs.result(), pool.submit(self._prepare, following)
                for (clip_id, _), answer in zip(batch, self._answer(batch, attempt, ready), strict=True):
                    record(clip_id, answer)
                batch = following

    def caption(self, clips: "Sequence[np.ndarray]", attempt: int = 0) -> list[Answer]:
        """Answers for one batch of clips, each uint8 [P, H, W, 3]."""
        batch = [(str(index), frames) for index, frames in enumerate(clips)]
        return self._answer(batch, attempt, self._prepare(batch))

    def _prepare(self, batch: "list[Question]") -> Any:
        """The model's inputs, on the CPU; nothing for an empty batch."""
        from PIL import Image

        if not batch:
            return None
        images = [[Image.fromarray(frame) for frame in frames] for _, frames in batch]
        texts = [self._prompt(len(frames)) for _, frames in batch]
        return self.processor(images=images, text=texts, padding=True, return_tensors="pt")

    def _prompt(self, frames: int) -> str:
        if self.processor.chat_template is None:
            return "<image>" * frames + " " + self.config.prompt
        content = [{"type": "image"}] * frames + [{"type": "text", "text": self.config.prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _answer(self, batch: "list[Question]", attempt: int, inputs: Any) -> list[Answer]:
        """Answers of a batch, in halves where the GPU has no room for the whole."""
        import torch

        try:
            return self._generate(inputs, _seed(batch, attempt) if attempt else None)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise StepError(f"the GPU has no room to caption a single clip: {error}") from None
        # Outside `except`: there the error still holds the tensors that filled the memory.
        torch.cuda.empty_cache()
        half = len(batch) // 2
        if half < self.batch_size:
            self.batch_size = half
            said = f"captioning: no room on the GPU for {len(batch)} clips; from now on {half} at once"
            print(said, file=sys.stderr, flush=True)
        parts = [batch[:half], batch[half:]]
        return [answer for part in parts for answer in self._answer(part, attempt, self._prepare(part))]

    def _generate(self, inputs: Any, seed: int | None) -> list[Answer]:
        """Greedy, or drawn at `caption.retry_temperature` where there is a seed."""
        import torch

        inputs = inputs.to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if seed is not None and self.config.retry_temperature:
            torch.manual_seed(seed)
            how = {"do_sample": True, "temperature": self.config.retry_temperature}
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, **how)
        rows = out[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self._decoder.batch_decode(rows, skip_special_tokens=True)
        ended = [not self._ends.isdisjoint(row) for row in rows]
        return [Answer(text.strip(), "stop" if end else "length") for text, end in zip(texts, ended, strict=True)]


def _seed(batch: "list[Question]", attempt: int) -> int:
    """The same batch draws the same captions at the same attempt, wherever it runs."""
    text = " ".join([str(attempt), *(clip_id for clip_id, _ in batch)])
    return int.from_bytes(sha256(text.encode()).digest()[:4])
