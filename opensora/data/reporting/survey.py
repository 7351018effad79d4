"""Facts of a data set, gathered from its manifests in one pass and bounded memory: counts, hours of video, samples."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import urlparse

from opensora.config import DATA_STEPS
from opensora.data.repeats import key_number
from opensora.manifest import GIVEN, Clip, Tally, count_rows, list_parts, read_part
from opensora.progress import progress
from opensora.step import REPORT, STORE, Report, StepError, read_report

Item = TypeVar("Item")
VALUES = 20_000  # rows whose values are kept, of the kept and of the dropped each
CAPTIONS = 5_000  # captions whose words are counted
GIVEN_WORDS, GENERATED_WORDS = "words, given", "words, generated"
FILES = (  # step, pattern, what it is
    ("split", "clips-*.tar", "clips, tar"),
    ("encode", "latents-*.safetensors", "latents, safetensors"),
    ("encode", "text-*.safetensors", "text embeddings, safetensors"),
)


class Sample(Generic[Item]):
    """A uniform sample of at most `size` rows: those of lowest `key_number`, its rank (bottom-k
    sampling, Cohen and Kaplan 2007).

    The order of the rows does not matter, and a row that is in one report's sample is likely in the next one's.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self._limit = 1 << 64
        self._rows: list[tuple[int, int, Item]] = []

    def add(self, key: int, item: Item) -> None:
        """Offer a row of the rank `key`."""
        self.seen += 1
        if key < self._limit:
            self._rows.append((key, self.seen, item))
            if len(self._rows) > 2 * self.size:
                self._trim()

    def _trim(self) -> None:
        self._rows.sort(key=lambda row: row[:2])
        del self._rows[self.size :]
        if len(self._rows) == self.size:
            self._limit = self._rows[-1][0]

    def items(self) -> list[Item]:
        """The sample, lowest rank first."""
        self._trim()
        return [item for _, _, item in self._rows]


@dataclass
class Count:
    """Rows and seconds of video."""

    kept: int = 0
    dropped: int = 0
    kept_s: float = 0.0
    dropped_s: float = 0.0

    @property
    def total(self) -> int:
        """Kept and dropped rows."""
        return self.kept + self.dropped

    def add(self, clip: Clip) -> None:
        """Count one more row."""
        if clip.kept:
            self.kept += 1
            self.kept_s += clip.end_s - clip.start_s
        else:
            self.dropped += 1
            self.dropped_s += clip.end_s - clip.start_s


@dataclass(frozen=True)
class StepFacts:
    """One finished step."""

    report: Report
    hours: float  # of the rows that it kept
    dropped: dict[str, int]  # by reason, by this step alone
    parts: int
    finished: float  # time of its report, seconds since 1970

    @property
    def name(self) -> str:
        """The step."""
        return self.report.step


@dataclass
class Survey:
    """What the manifest of the last finished step says, with the steps that led to it."""

    steps: list[StepFacts]
    examples: int  # clips of a sample that is shown
    tally: Tally = field(default_factory=Tally)
    whole: Count = field(default_factory=Count)
    reasons: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    licences: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    places: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))  # hosts and folders
    sizes: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    rates: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    models: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))  # who wrote the captions
    values: dict[bool, Sample[dict[str, float]]] = field(
        default_factory=lambda: {True: Sample(VALUES), False: Sample(VALUES)}  # of kept and of dropped rows
    )
    captions: Sample[str] = field(default_factory=lambda: Sample(CAPTIONS))
    kept_clips: Sample[Clip] = field(init=False)
    dropped_clips: dict[str, Sample[Clip]] = field(default_factory=dict)  # by reason

    def __post_init__(self) -> None:
        self.kept_clips = Sample(self.examples)

    def add(self, clips: Iterable[Clip]) -> None:
        """Count more rows."""
        for clip in clips:
            key = key_number(clip.clip_id)
            self.whole.add(clip)
            self.licences[clip.licence].add(clip)
            self.places[place(clip.source)].add(clip)
            if clip.width:
                self.sizes[f"{clip.width}×{clip.height}"].add(clip)
                self.rates[f"{clip.fps:.4g}"].add(clip)
                self.values[clip.kept].add(key, row_values(clip))
            if clip.kept:
                self.kept_clips.add(key, clip)
                if clip.caption:
                    self.models[clip.caption_model or "not recorded"].add(clip)
                    self.captions.add(key, clip.caption)
            else:
                reason = clip.reason.split(":")[0] or "no reason"
                self.reasons[reason].add(clip)
                self.dropped_clips.setdefault(reason, Sample(self.examples)).add(key, clip)

    @property
    def last(self) -> StepFacts:
        """The step whose manifest was read."""
        return self.steps[-1]

    @property
    def stale(self) -> list[str]:
        """Steps that finished after a step that reads their result."""
        pairs = zip(self.steps[:-1], self.steps[1:], strict=True)
        return [before.name for before, after in pairs if before.finished > after.finished + 1]


def survey(base: Path, examples: int) -> Survey:
    """Read the manifest of the last finished data step below `base`.

    Rows that a step drops are carried through the steps after it, so that the last manifest holds them all.

    Args:
        examples: rows of each sample of clips.

    Raises:
        StepError: no data step has finished.
        ManifestError: a part is damaged or foreign.
    """
    steps: list[StepFacts] = []
    for name in DATA_STEPS:
        if not (base / name / REPORT).is_file():
            break
        steps.append(_step_facts(base / name, steps[-1].report if steps else None))
    if not steps:
        raise StepError(f"no data step has finished in {base}; run `opensora download` first")
    facts = Survey(steps, examples)
    folder = base / steps[-1].name
    with progress(count_rows(folder), "reading the manifest") as advance:
        for path in list_parts(folder):
            clips = read_part(path)
            facts.add(clips)
            for _ in clips:
                advance()
    return facts


def _step_facts(folder: Path, before: Report | None) -> StepFacts:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    report = read_report(folder)
    seconds = 0.0
    parts = list_parts(folder)
    for path in parts:
        table = pq.read_table(path, columns=["kept", "start_s", "end_s"])
        length = pc.subtract(table["end_s"], table["start_s"])
        seconds += pc.sum(pc.if_else(table["kept"], length, 0.0)).as_py() or 0.0
    own = Counter(report.dropped) - Counter(before.dropped if before else {})
    return StepFacts(report, seconds / 3600, dict(own), len(parts), (folder / REPORT).stat().st_mtime)


def row_values(clip: Clip) -> dict[str, float]:
    """All numbers of a row that have a histogram."""
    values = {"duration_s": clip.end_s - clip.start_s, "short_side": float(min(clip.width, clip.height))}
    values |= clip.scores
    if clip.caption:
        values[GIVEN_WORDS if clip.caption_model == GIVEN else GENERATED_WORDS] = float(len(clip.caption.split()))
    return values


def place(source: str) -> str:
    """The host of a URL, the bucket, or the folder of a file."""
    url = urlparse(source)
    if url.scheme in ("http", "https"):
        return url.hostname or source
    return f"{url.scheme}://{url.netloc}" if url.netloc else str(Path(source).parent)


@dataclass(frozen=True)
class Files:
    """Files of one kind."""

    kind: str
    sizes: list[int]  # bytes


def list_files(base: Path) -> list[Files]:
    """What lies on the disk below `base`, by kind."""
    found = [
        Files(kind, [path.stat().st_size for path in (base / step).glob(pattern)]) for step, pattern, kind in FILES
    ]
    manifests = [path.stat().st_size for step in DATA_STEPS for path in (base / step).glob("manifest-*.parquet")]
    videos = base / STORE
    sources = [entry.stat().st_size for entry in os.scandir(videos) if entry.is_file()] if videos.is_dir() else []
    return [Files("downloaded videos", sources), *found, Files("manifests of all steps", manifests)]
