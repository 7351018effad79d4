"""Real steps are sound; every fault put into them is named, with the file, the row and the clip."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora.data.repeats import Repeats, key_number
from opensora.data.shards import latent_names, text_key, write_tensors
from opensora.data.validation.problems import UnreadableError
from opensora.data.validation.validate import validate
from opensora.manifest import GIVEN, Clip, list_parts, part_name, read_part, write_part
from opensora.step import read_report, write_json
from tests.manifests import clip, finish

SIZES = ((32, 32), (64, 64))


@pytest.fixture(scope="module")
def sound(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five steps: real ones up to `score`, then captions and latents made by hand."""
    base = tmp_path_factory.mktemp("sound") / "smoke"
    for step in ("download", "videos", "split", "score"):
        shutil.copytree(clips / step, base / step)
    captioned, encoded = [], []
    for index, path in enumerate(list_parts(base / "score")):
        rows = [_captioned(row, number) for number, row in enumerate(read_part(path))]
        captioned.append(rows)
        names = {"latent_shard": f"latents-{index:05d}-00.safetensors", "text_shard": f"text-{index:05d}.safetensors"}
        encoded.append([replace(row, **names) if row.kept else row for row in rows])
    finish(base, "caption", captioned)
    folder = finish(base, "encode", encoded)
    for rows in encoded:
        kept = [row for row in rows if row.kept]
        latents = {}
        for row in kept:
            for height, width in SIZES:
                for name in latent_names(row.clip_id, height, width):
                    latents[name] = torch.zeros(row.frames, 4, height // 8, width // 8, dtype=torch.float16)
        write_tensors(folder / kept[0].latent_shard, latents)
        write_tensors(folder / kept[0].text_shard, {text_key(row.caption): torch.ones(3, 8) for row in kept})
    return base


def _captioned(row: Clip, number: int) -> Clip:
    if number % 2:
        return replace(row, caption=f"a red circle {number}", caption_model=GIVEN)
    return replace(row, caption="a blue square", caption_model="llava", caption_prompt="what moves where")


@pytest.fixture
def steps(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "smoke"))


def problems(path: Path, deep: bool = False) -> list[str]:
    return [str(problem) for problem in validate(path, deep)]


def change(folder: Path, row: int, edit: Callable[[Clip], Clip], part: int = 0) -> str:
    """Edit a row; returns where it is."""
    path = list_parts(folder)[part]
    rows = read_part(path)
    rows[row] = edit(rows[row])
    write_part(path, rows)
    return f"{folder.name}/{path.name}:{row + 1} clip {rows[row].clip_id}"


@pytest.mark.parametrize("step", ["download", "split", "score", "caption", "encode"])
def test_sound_steps_are_sound_to_the_last_byte(sound: Path, step: str) -> None:
    assert problems(sound / step, deep=True) == []
    assert problems(sound / step / part_name(0), deep=True) == []


FAULTS: dict[str, tuple[str, dict[str, object], str]] = {
    "empty id": ("split", {"clip_id": ""}, "clip_id is empty"),
    "empty licence": ("download", {"licence": " "}, "licence is empty; 'unknown' was expected"),
    "kept with a reason": ("score", {"reason": "still: 0"}, "kept, but has the reason 'still: 0'"),
    "dropped without a reason": ("encode", {"kept": False}, "dropped without a reason"),
    "backwards": ("split", {"start_s": 3.0, "end_s": 2.0}, "span is 3 to 2 s; 0 ≤ start < end was expected"),
    "frames of the source": ("split", {"start_frame": 9, "end_frame": 9}, "frames 9 to 9 of the source"),
    "too many frames": ("split", {"frames": 99}, "99 frames; 2.000 s at 8 fps are 16.0"),
    "no rate": ("score", {"fps": float("nan")}, "fps is nan; a positive number was expected"),
    "odd": ("split", {"width": 63}, "size is 63x64; even numbers were expected"),
    "no size": ("download", {"height": 0}, "size is 64x0; positive numbers were expected"),
    "hash": ("download", {"source_sha256": "XYZ"}, "source_sha256 is 'XYZ'; 64 hexadecimal digits"),
    "score": ("score", {"scores": {"motion": float("inf"), "black": 0.0}}, "scores are not finite: motion inf"),
    "no scores": ("score", {"scores": {}}, "no scores, though it was kept"),
    "no caption": ("caption", {"caption": " "}, "caption is empty, though it was kept"),
    "no model": ("caption", {"caption_model": ""}, "caption_model is empty; the model's name or 'given'"),
    "no prompt": ("encode", {"caption_prompt": ""}, "caption_prompt is empty, though llava wrote the caption"),
    "no latents": ("encode", {"latent_shard": ""}, "latent_shard is empty"),
    "video gone": ("download", {"path": "videos/none.mp4"}, "videos/none.mp4 is missing"),
    "shard gone": ("score", {"shard": "clips-00000-09.tar"}, "clips-00000-09.tar is missing in"),
    "past the end": ("caption", {"size": 10**9}, "which has"),
    "other bytes": ("score", {"offset": 1000}, "was expected"),
    "no place": ("split", {"shard": ""}, "place of its bytes is ''"),
    "latents gone": ("encode", {"latent_shard": "latents-9.safetensors"}, "latents-9.safetensors is missing"),
    "another caption": ("encode", {"caption": "a cat"}, "has no text embedding"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_row_is_named(steps: Path, name: str) -> None:
    step, changes, expected = FAULTS[name]
    rows = read_part(list_parts(steps / step)[0])
    place = next(number for number, row in enumerate(rows) if row.kept and number % 2 == 0)  # captioned by LLaVA
    where = change(steps / step, place, lambda row: replace(row, **changes))
    found = [line for line in problems(steps / step) if line.startswith(where)]
    assert any(expected in line for line in found), found


def test_two_rows_of_one_id_in_two_parts(steps: Path) -> None:
    first = read_part(list_parts(steps / "split")[0])[0]
    where = change(steps / "split", 1, lambda row: replace(row, clip_id=first.clip_id), part=1)
    found = problems(steps / "split")
    assert f"{where}: the same clip id as split/manifest-00000.parquet:1 clip {first.clip_id}" in "\n".join(found)


def test_a_dropped_copy_of_a_video_is_no_fault(steps: Path) -> None:
    first = read_part(list_parts(steps / "download")[0])[0]
    copy = replace(first, path="", kept=False, reason="duplicate: the same file came before")
    change(steps / "download", 1, lambda row: copy, part=1)
    assert not any("same clip id" in line for line in problems(steps / "download"))


def test_bytes_that_belong_to_two_clips(steps: Path) -> None:
    before = read_part(list_parts(steps / "split")[0])[0]
    where = change(steps / "split", 1, lambda row: replace(row, offset=before.offset + 100))
    found = problems(steps / "split")
    assert any(line.startswith(where) and f"overlap those of clip {before.clip_id}" in line for line in found)


def test_a_shard_of_another_part(steps: Path) -> None:
    shutil.copy(steps / "split" / "clips-00000-00.tar", steps / "split" / "clips-00007-00.tar")
    where = change(steps / "split", 1, lambda row: replace(row, shard="clips-00007-00.tar"))
    assert f"{where}: lies in clips-00007-00.tar; clips of this part lie in clips-00000-….tar" in problems(
        steps / "split"
    )


def test_shards_that_were_cut_off_or_overwritten(steps: Path) -> None:
    path = steps / "split" / "clips-00000-00.tar"
    rows = read_part(list_parts(steps / "split")[0])
    data = bytearray(path.read_bytes())
    data[rows[0].offset + 4 : rows[0].offset + 8] = b"\0\0\0\0"
    path.write_bytes(data[: rows[-1].offset + 10])
    found = problems(steps / "split")
    assert any(f"the bytes at {rows[0].offset:,} of {path.name} are no mp4" in line for line in found)
    assert any(f"clip {rows[-1].clip_id}: bytes to" in line for line in found)


def test_only_a_deep_look_sees_a_damaged_picture_or_a_wrong_size(steps: Path) -> None:
    path = steps / "split" / "clips-00000-00.tar"
    rows = read_part(list_parts(steps / "split")[0])
    data = bytearray(path.read_bytes())
    middle = rows[0].offset + 64
    data[middle : middle + rows[0].size // 2] = os.urandom(rows[0].size // 2)
    path.write_bytes(data)
    wide = change(steps / "split", 1, lambda row: replace(row, width=62))
    longer = change(steps / "split", 2, lambda row: replace(row, frames=row.frames + 1))
    assert problems(steps / "split") == []
    found = problems(steps / "split", deep=True)
    assert len(found) == 3
    assert f"split/manifest-00000.parquet:1 clip {rows[0].clip_id}: does not decode" in found[0]
    assert found[1] == f"{wide}: frames are 64x64, the row says 62x64"
    assert found[2] == f"{longer}: 16 frames decode, the row says 17"


def test_latents(steps: Path) -> None:
    folder = steps / "encode"
    rows = [row for row in read_part(list_parts(folder)[0]) if row.kept]
    tensors = {}
    for row in rows[1:]:
        for size in SIZES:
            mean, deviation = latent_names(row.clip_id, *size)
            frames = row.frames - (row is rows[1])
            tensors[mean] = torch.zeros(frames, 4, 4, 4)
            tensors[deviation] = torch.full((row.frames, 4, 4, 4), float("nan") if row is rows[2] else 1.0)
    write_tensors(folder / rows[0].latent_shard, tensors)
    found = problems(folder)
    assert any(
        f"clip {rows[0].clip_id}: {rows[0].latent_shard} has no {rows[0].clip_id}/32x32/mean" in x for x in found
    )
    assert any(f"clip {rows[1].clip_id}: latents {rows[1].clip_id}/32x32/mean are [15, 4, 4, 4]" in x for x in found)
    assert not any(rows[2].clip_id in line for line in found)
    assert any(f"clip {rows[2].clip_id}: latents {rows[2].clip_id}/64x64/std are not finite" in x
               for x in problems(folder, deep=True))  # fmt: skip
    (folder / rows[0].latent_shard).write_bytes(b"not tensors at all")
    assert sum("is damaged" in line for line in problems(folder)) == 1
    (folder / rows[0].latent_shard).unlink()
    assert sum("is missing" in line for line in problems(folder)) == 1


def test_missing_and_unreadable_parts(steps: Path) -> None:
    parts = list_parts(steps / "caption")
    parts[1].write_bytes(parts[1].read_bytes()[:200])
    found = problems(steps / "caption")
    assert any(
        line.startswith("caption/manifest-00001.parquet: ") and "not a readable parquet" in line for line in found
    )
    parts[1].unlink()
    assert any("manifest-00001.parquet is missing, which score has; run `opensora caption`" in line
               for line in problems(steps / "caption"))  # fmt: skip
    parts[0].rename(steps / "caption" / part_name(3))
    assert sum("is missing, though manifest-00003.parquet is there" in x for x in problems(steps / "caption")) == 3


def test_the_report_and_the_step_before_must_fit(steps: Path) -> None:
    dropped = change(steps / "score", 0, lambda row: replace(row, kept=False, reason="still: 0"))
    found = problems(steps / "caption")
    assert f"{dropped.replace('score/', 'caption/')}: kept, but score dropped it: run `opensora caption`" in found
    kept = read_report(steps / "score").kept
    expected = f"report.json: says 16 rows, {kept} kept; the parts hold 16, {kept - 1} kept"
    assert any(expected in line for line in problems(steps / "score"))
    write_part(list_parts(steps / "encode")[1], [])
    assert any("0 rows; caption/manifest-00001.parquet has 8" in line for line in problems(steps / "encode"))


def test_unfinished_work_is_told(steps: Path) -> None:
    (steps / "score" / "report.json").unlink()
    (steps / "score" / "manifest-00001.parquet.part").write_bytes(b"")
    found = "\n".join(problems(steps / "score"))
    assert "no report.json: the step has not finished" in found
    assert "manifest-00001.parquet.part is half-written" in found
    write_json(steps / "split" / "report.json", ["what"])
    assert any("not a report" in line for line in problems(steps / "split"))


def test_videos_may_be_gone_as_a_whole(steps: Path) -> None:
    for part, path in enumerate(list_parts(steps / "download")):
        for row in range(len(read_part(path))):
            change(steps / "download", row, lambda clip: replace(clip, path=f"videos/{clip.clip_id}.mp4"), part)
    assert len(problems(steps / "download")) == 4
    shutil.rmtree(steps / "videos")
    found = problems(steps / "download")
    assert len(found) == 2  # once a part
    assert "videos is missing in" in found[0]
    assert problems(steps / "split") == []


@pytest.mark.parametrize("name", ["nowhere", "folder", "part", "foreign"])
def test_what_cannot_be_read_at_all(tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    match name:
        case "nowhere":
            path = tmp_path / "nowhere"
        case "part":
            path = path / part_name(0)
            path.write_bytes(b"junk")
        case "foreign":
            (path / part_name(0)).write_bytes(b"junk")
    with pytest.raises(UnreadableError) as caught:
        problems(path)
    assert caught.value.exit_code == 2


def test_repeats_among_many_keys() -> None:
    repeats = Repeats()
    for number in range(100_000):
        repeats.add(str(number))
    assert repeats.find() == set()
    for number in (7, 99_999, 7):
        repeats.add(str(number))
    assert repeats.find() == {key_number("7"), key_number("99999")}
    assert Repeats().find() == set()


def test_rows_of_an_unknown_step_are_checked_as_far_as_they_go(tmp_path: Path) -> None:
    folder = finish(tmp_path, "copy", [[clip(1, shard=""), clip(2, shard="", scores={"motion": float("nan")})]])
    found = problems(folder)
    assert "of which step is not known" in found[0]
    assert len(found) == 2
    assert "scores are not finite: motion nan" in found[1]
