"""Check what a data step wrote, or a list of videos before it is fetched: a line a problem, saying where and what."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opensora.config import DATA_STEPS
from opensora.data.repeats import Repeats, key_number
from opensora.data.validation.problems import Problem, UnreadableError
from opensora.data.validation.row_checks import clip_in_shard, decoded, files_of, latents, row_rules
from opensora.manifest import (
    PART_NAME,
    Clip,
    ManifestError,
    Tally,
    list_parts,
    part_index,
    part_name,
    read_part,
)
from opensora.progress import plain_lines
from opensora.step import REPORT, StepError, read_report


def validate(path: Path, deep: bool = False, list_format: str = "", videos: str = "") -> Iterator[Problem]:
    """Problems of a step's folder, of one part of its manifest, or of a list of videos.

    Args:
        deep: decode every clip and read every latent too.
        list_format, videos: of a list, as `download.list_format` and `download.videos`.

    Raises:
        UnreadableError: there is no such file, or nothing in it could be read.
    """
    if path.is_dir():
        yield from _check_folder(path, deep)
    elif not path.is_file():
        raise UnreadableError(f"nothing at {path}; give a step's folder, {part_name(0)} or a list of videos")
    elif PART_NAME.fullmatch(path.name):
        try:
            clips = read_part(path)
        except ManifestError as error:
            raise UnreadableError(str(error)) from error
        yield from _check_part(path, clips, step_of(path.parent), deep)
    else:
        from opensora.data.validation.list_checks import check_list

        yield from check_list(path, list_format, videos)


def step_of(folder: Path) -> str:
    """The step that wrote a folder, by its report or its name; empty if neither tells."""
    try:
        name = read_report(folder).step
    except (StepError, ValueError, TypeError):
        name = folder.name
    return name if name in DATA_STEPS else ""


def _check_folder(folder: Path, deep: bool) -> Iterator[Problem]:
    try:
        parts = list_parts(folder)
    except ManifestError:
        raise UnreadableError(f"no manifest in {folder}; give the folder of a data step, as runs/demo/score") from None
    step = step_of(folder)
    if not step:
        yield Problem(str(folder), f"of which step is not known: no {REPORT}, and the folder is not named after one")
    yield from _check_numbers(folder, parts, step)
    say = plain_lines("checking rows", sum(_rows(path) for path in parts))
    tally, repeats, failures = Tally(), Repeats(), 0
    for path in parts:
        try:
            clips = read_part(path)
        except ManifestError as error:
            failures += 1
            if failures == len(parts):
                raise UnreadableError(str(error)) from error
            yield Problem(_where(path), str(error))
            continue
        for clip in clips:
            if clip.kept:
                repeats.add(clip.clip_id)
        yield from _check_part(path, clips, step, deep)
        say(tally.add(clips).total)
    yield from _check_repeats(parts, repeats.find())
    if not failures:
        yield from _check_report(folder, tally)


def _rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError):
        return 0


def _where(path: Path, row: int | None = None, clip: Clip | None = None) -> str:
    place = f"{path.parent.name}/{path.name}"
    return place if row is None or clip is None else f"{place}:{row} clip {clip.clip_id or '?'}"


def _check_numbers(folder: Path, parts: list[Path], step: str) -> Iterator[Problem]:
    """Parts are numbered without gaps, as those of the step before; nothing half-written lies around."""
    names = {path.name for path in parts}
    for index in range(part_index(parts[-1])):
        if part_name(index) not in names:
            yield Problem(str(folder), f"{part_name(index)} is missing, though {parts[-1].name} is there")
    before = _folder_before(folder, step)
    if before is not None:
        for path in list_parts(before):
            if path.name > parts[-1].name:
                yield Problem(str(folder), f"{path.name} is missing, which {before.name} has; run `opensora {step}`")
    for path in sorted(folder.glob("*.part")):
        yield Problem(str(folder), f"{path.name} is half-written; it was left by a stopped run and may be deleted")


def _folder_before(folder: Path, step: str) -> Path | None:
    """The folder of the step whose manifest this one carries on, if it is there."""
    if step not in DATA_STEPS[1:]:
        return None
    before = folder.parent / DATA_STEPS[DATA_STEPS.index(step) - 1]
    return before if any(before.glob("manifest-*.parquet")) else None


def _check_report(folder: Path, tally: Tally) -> Iterator[Problem]:
    try:
        report = read_report(folder)
    except StepError:
        yield Problem(str(folder), f"no {REPORT}: the step has not finished")
        return
    except (ValueError, TypeError) as error:
        yield Problem(str(folder / REPORT), f"not a report: {error}")
        return
    said, found = (report.total, report.kept), (tally.total, tally.kept)
    if said != found:
        yield Problem(
            str(folder / REPORT), f"says {said[0]} rows, {said[1]} kept; the parts hold {found[0]}, {found[1]} kept"
        )


def _check_repeats(parts: list[Path], repeated: set[int]) -> Iterator[Problem]:
    """Two kept rows of one id; a dropped copy of a video bears the id of the first on purpose."""
    first: dict[str, str] = {}
    for path in parts if repeated else ():
        try:
            clips = read_part(path)
        except ManifestError:
            continue
        for row, clip in enumerate(clips, start=1):
            if clip.kept and key_number(clip.clip_id) in repeated:
                where = _where(path, row, clip)
                if clip.clip_id in first:
                    yield Problem(where, f"the same clip id as {first[clip.clip_id]}; ids must be unique")
                first.setdefault(clip.clip_id, where)


def _check_part(path: Path, clips: list[Clip], step: str, deep: bool) -> Iterator[Problem]:
    shards = path.parent if step == "split" else path.parent.parent / "split"
    said: set[str] = set()  # a missing file is one problem, not one a clip
    for row, clip in enumerate(clips, start=1):
        found = list(row_rules(clip, step))
        found += files_of(clip, step, path.parent, shards, said)
        if not found and clip.shard:
            found += clip_in_shard(clip, shards)
        if not found and deep and clip.kept:
            found += decoded(clip, step, path.parent, shards)
        yield from (Problem(_where(path, row, clip), what) for what in found)
    yield from _check_ranges(path, clips)
    if step == "encode":
        yield from (Problem(_where(path, row, clip), what) for row, clip, what in latents(clips, path.parent, deep))
    before = _folder_before(path.parent, step)
    if before is not None and step != "split" and (before / path.name).is_file():
        yield from _check_carried(path, clips, before / path.name)


def _check_ranges(path: Path, clips: list[Clip]) -> Iterator[Problem]:
    """A shard holds clips of one part alone, and no byte belongs to two of them."""
    number = f"clips-{part_index(path):05d}-"
    rows = [(clip.shard, clip.offset, row, clip) for row, clip in enumerate(clips, start=1) if clip.shard]
    rows.sort(key=lambda entry: entry[:3])
    for place, (shard, offset, row, clip) in enumerate(rows):
        if not shard.startswith(number):
            yield Problem(_where(path, row, clip), f"lies in {shard}; clips of this part lie in {number}….tar")
        if place and rows[place - 1][0] == shard:
            _, start, _, other = rows[place - 1]
            if start + other.size > offset:
                what = f"bytes {offset:,} to {offset + clip.size:,} of {shard} overlap those of clip {other.clip_id}"
                yield Problem(_where(path, row, clip), what)


def _check_carried(path: Path, clips: list[Clip], before: Path) -> Iterator[Problem]:
    """After `split`, row N is the same clip in every step, and one that was dropped stays so."""
    step = path.parent.name
    try:
        table = pq.read_table(before, columns=["clip_id", "kept"]).to_pydict()
    except (pa.ArrowInvalid, OSError) as error:
        yield Problem(_where(before), f"cannot be read, and is what {step} was made from: {error}")
        return
    if len(clips) != len(table["clip_id"]):
        yield Problem(
            _where(path),
            f"{len(clips)} rows; {_where(before)} has {len(table['clip_id'])}: run `opensora {step}` again",
        )
        return
    for row, (clip, identity, kept) in enumerate(zip(clips, table["clip_id"], table["kept"], strict=True), start=1):
        if clip.clip_id != identity:
            yield Problem(_where(path, row, clip), f"{_where(before)} has clip {identity} in this row")
        elif clip.kept and not kept:
            yield Problem(_where(path, row, clip), f"kept, but {before.parent.name} dropped it: run `opensora {step}`")
