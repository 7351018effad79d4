"""What captioning models answered: which answers are captions, and the record of all of them, a JSON line each."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from opensora.manifest import Clip

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Question = tuple[str, np.ndarray]  # clip id, frames uint8 [P, H, W, 3] in the order of time


@dataclass(frozen=True)
class Answer:
    """What a model said of one clip, or why it said nothing."""

    text: str  # for `failed` the reason of the dropped row
    finish: Literal["stop", "length", "filtered", "failed"] = (
        "stop"  # by itself, at the limit of tokens, withheld, none
    )


class Backend(Protocol):
    """What describes clips; a process keeps one."""

    ahead: int  # clips whose frames are read while others are being described

    def ask(self, questions: "Iterable[Question]", attempt: int, record: "Callable[[str, Answer], None]") -> None:
        """Call `record(clip_id, answer)` for every question, in any order, from any thread, as soon as it is known.

        Args:
            questions: taken as they are needed, so that few clips are in memory.
            attempt: 0 is greedy; later ones are drawn at `caption.retry_temperature`, each in its own way.

        Raises:
            StepError: no clip can be described; what was recorded stands.
        """


# Beginnings by which models say that they will not or cannot answer; no caption begins so.
REFUSALS = re.compile(
    r"""["'“]?(
        (i['’]m|i\ am)\ (very\ |so\ |really\ )?sorry
      | sorry,
      | (i|we)\ apologi[sz]e
      | (unfortunately,\ )?i\ (cannot|can\ ?not|can['’]t|could\ not|couldn['’]t|will\ not|won['’]t|don['’]t|do\ not)\b
      | (unfortunately,\ )?(i['’]m|i\ am)\ (unable|not\ able|not\ allowed|just\ an?|only\ an?)\b
      | as\ an?\ (ai|artificial|large\ language|language|text|assistant)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
LOOP_UNITS = 24  # words, or letters of a script without spaces; shorter texts are not looked at
LOOP_RUN = 4  # units that are compared at once
LOOP_SHARE = 0.5  # share of different runs below which a text only repeats itself; prose has 0.95 and more
SHOWN = 80  # letters of an answer in a reason


def clean_text(text: str) -> str:
    """One line without doubled spaces, fit for UTF-8."""
    return " ".join(text.encode(errors="replace").decode().split())


def find_fault(answer: Answer) -> str:
    """Why an answer is no caption, as the reason of a dropped row; empty for a caption."""
    text = clean_text(answer.text)
    if answer.finish == "failed":
        return text
    if answer.finish == "filtered":
        return "caption refused: withheld by the server's filter"
    if not text:
        return "caption empty"
    if REFUSALS.match(text):
        return f"caption refused: {text[:SHOWN]}"
    if repeats_itself(text):  # before the next: a loop reaches any limit
        return f"caption repeats itself: {text[:SHOWN]}"
    if answer.finish == "length":
        return "caption cut off: raise caption.max_new_tokens"
    return ""


def repeats_itself(text: str) -> bool:
    """Whether most of a text was said before in it, as when a model falls into a loop."""
    units = text.lower().split() if " " in text else list(text)
    if len(units) < LOOP_UNITS:
        return False
    runs = [tuple(units[start : start + LOOP_RUN]) for start in range(len(units) - LOOP_RUN + 1)]
    return len(set(runs)) < LOOP_SHARE * len(runs)


class AnswerLog:
    """Answers kept for good: one file a source video, a line an answer, only ever appended to.

    A video's clips lie in one shard, so each file has one writer, and a shard reads the files of its own videos alone,
    whatever other videos, shards or thresholds there were when they were written.
    """

    def __init__(self, folder: Path, max_new_tokens: int) -> None:
        self.folder = folder
        self.limit = max_new_tokens

    def read(self, clips: Iterable[Clip]) -> dict[str, list[Answer]]:
        """Earlier answers of each clip, in order.

        Those cut off at a lower limit of tokens than today's do not count; a line that a kill has torn is no answer.
        """
        wanted = {clip.clip_id: clip for clip in clips}
        found: dict[str, list[Answer]] = {clip_id: [] for clip_id in wanted}
        for path in sorted({self._path(clip) for clip in wanted.values()}):
            for line in path.read_bytes().splitlines() if path.is_file() else ():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                short = row["finish"] == "length" and row["max_new_tokens"] < self.limit
                if row["clip_id"] in found and not short:
                    found[row["clip_id"]].append(Answer(row["text"], row["finish"]))
        return found

    def append(self, clip: Clip, answer: Answer) -> None:
        """Write one answer down. Not one of `failed`, which says nothing of the clip."""
        if answer.finish == "failed":
            return
        row = {"clip_id": clip.clip_id, "finish": answer.finish, "text": answer.text, "max_new_tokens": self.limit}
        path = self._path(clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as handle:
            end = handle.seek(0, 2)
            if end:
                handle.seek(end - 1)
            torn = bool(end) and handle.read(1) != b"\n"
            handle.write(b"\n" * torn + json.dumps(row).encode() + b"\n")

    def _path(self, clip: Clip) -> Path:
        source = clip.source_sha256 or clip.clip_id
        return self.folder / source[:2] / f"{source}.jsonl"
