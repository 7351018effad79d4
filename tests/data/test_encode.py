"""Encoding: keyed latents and texts of every kept clip, the same bytes by any way, and only what is new is made."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora.config import EncodeConfig, ExecutorConfig
from opensora.data import encode, keyed_files
from opensora.data.clip_reader import cut_centre
from opensora.data.keyed_files import fill
from opensora.data.shards import read_clip, text_key
from opensora.data.video import read_frames
from opensora.manifest import Clip, kept_clips, part_name, read_manifest, read_part, write_part
from opensora.models.text import TextEncoder
from opensora.models.vae import FrameVAE
from opensora.step import StepError
from tests.data.made_clips import encode as make_clip
from tests.data.made_clips import write_split

SEQUENTIAL = ExecutorConfig(kind="sequential", retries=0)
CONFIG = EncodeConfig(sizes=((32, 48), (16, 16)), max_tokens=8, shard_mib=1)
WORDS = ["a red circle moving left", "a blue square moving up", "a red circle moving left", "a", ""]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of three clips of 48x32 pixels, the last one dropped earlier; captions of the first and third agree."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    made = []
    for index, words in enumerate(WORDS):
        frames = list(random.integers(0, 255, (10 + index, 32, 48, 3), np.uint8))
        made.append(make_clip(frames, clip_id=f"c{index}", caption=words))
    made.append((b"", Clip("c5", "x", kept=False, reason="dark")))
    write_split(folder / "split", [made[:3], made[3:]])
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Frames and texts that go through the models."""
    counts: Counter = Counter()
    vae, text = FrameVAE.encode, TextEncoder.encode

    def encode_frames(self: FrameVAE, frames: np.ndarray, micro_batch: int | None = None) -> tuple:
        counts["frames"] += len(frames)
        return vae(self, frames, micro_batch)

    def encode_texts(self: TextEncoder, texts: list[str], max_tokens: int) -> tuple:
        counts["texts"] += len(texts)
        return text(self, texts, max_tokens)

    monkeypatch.setattr(FrameVAE, "encode", encode_frames)
    monkeypatch.setattr(TextEncoder, "encode", encode_texts)
    return counts


class Runner:
    """Runs the step on a changing manifest of the clips in `base`, each time as DVC does: the old output is gone."""

    def __init__(self, base: Path, folder: Path, vae: Path, text: Path) -> None:
        self.base, self.folder, self.vae, self.text = base, folder, vae, text
        self.output = folder / "encode"
        self.parts = [read_part(base / "split" / part_name(index)) for index in range(2)]

    def __call__(self, config: EncodeConfig = CONFIG, executor: ExecutorConfig = SEQUENTIAL) -> dict[str, bytes]:
        inputs = self.folder / "caption"
        for index in range(2):
            inputs.mkdir(exist_ok=True)
            write_part(inputs / part_name(index), self.parts[index])
        shutil.rmtree(self.output, ignore_errors=True)
        self.report = encode.run(config, inputs, self.base / "split", self.vae, self.text, self.output, executor)
        assert not list(self.folder.rglob("*.part"))
        return {path.name: path.read_bytes() for path in self.output.glob("*.[sp]a[fr]*")}


@pytest.fixture
def run(base: Path, tmp_path: Path, vae: Path, text_encoder: Path) -> Runner:
    return Runner(base, tmp_path, vae, text_encoder)


def test_latents_and_texts_are_those_of_frames_and_captions(run: Runner, vae: Path, text_encoder: Path) -> None:
    run()
    assert (run.report.total, run.report.kept, run.report.dropped) == (6, 5, {"dark": 1})
    rows = read_manifest(run.output)
    assert [row.latent_shard for row in rows] == ["latents-00000-00.safetensors"] * 3 + [
        "latents-00001-00.safetensors"
    ] * 2 + [""]
    assert {row.text_shard for row in rows} == {"text-00000-00.safetensors", "text-00001-00.safetensors", ""}
    model, text = FrameVAE(vae), TextEncoder(text_encoder)
    for row in kept_clips(rows):
        frames = read_frames(read_clip(run.base / "split", row))
        with safe_open(run.output / row.latent_shard, "pt") as shard:
            for name, expected in zip(("mean", "std"), model.encode(frames), strict=True):
                found = shard.get_tensor(f"{row.clip_id}/32x48/{name}")
                assert (found.dtype, found.shape) == (torch.float16, (row.frames, 4, 8, 12))
                torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
            assert shard.get_slice(f"{row.clip_id}/16x16/mean").get_shape() == [row.frames, 4, 4, 4]
        embedding, mask = text.encode([row.caption], CONFIG.max_tokens)
        found = load_file(run.output / row.text_shard)[text_key(row.caption)]
        torch.testing.assert_close(found.float(), embedding[0, : int(mask.sum())], atol=2e-3, rtol=2e-3)
    assert len(load_file(run.output / "text-00000-00.safetensors")) == 2  # one for both clips of the same words


@pytest.mark.parametrize("kind", ["pool", "sequential"])
def test_the_executor_threads_and_rest_change_no_byte(run: Runner, base: Path, tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(2)
    first = run()
    other = Runner(base, tmp_path / "other", run.vae, run.text)
    other.folder.mkdir()
    again = other(CONFIG.model_copy(update={"workers": 2}), ExecutorConfig(kind=kind))  # type: ignore[arg-type]
    assert again == first


def test_what_is_stored_depends_on_the_clip_alone(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clips beside it, other chunks of frames: the numbers are those of a run on the clip alone."""
    run()
    whole = load_file(run.output / "latents-00000-00.safetensors")
    words = load_file(run.output / "text-00000-00.safetensors")
    alone = Runner(run.base, run.folder / "alone", run.vae, run.text)
    alone.folder.mkdir()
    alone.parts = [[alone.parts[0][1]], []]
    alone()
    for name, value in load_file(alone.output / "latents-00000-00.safetensors").items():
        assert torch.equal(value, whole[name])
    ((key, value),) = load_file(alone.output / "text-00000-00.safetensors").items()
    assert torch.equal(value, words[key])
    monkeypatch.setattr(encode, "CHUNK", 3)
    (run.folder / ".cache").rename(run.folder / "gone")
    run()
    for name, value in load_file(run.output / "latents-00000-00.safetensors").items():
        torch.testing.assert_close(value, whole[name], atol=2e-3, rtol=2e-3)


def test_files_are_filled_up_to_their_size(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {name: value for name, value in run().items() if name.startswith("latents")}
    monkeypatch.setattr(keyed_files, "fill", lambda keys, size, limit: fill(keys, size, 20_000))
    several = run(CONFIG.model_copy(update={"shard_mib": 2}))
    names = [name for name in sorted(several) if name.startswith("latents-00000")]
    assert names == ["latents-00000-00.safetensors", "latents-00000-01.safetensors", "latents-00000-02.safetensors"]
    whole: dict[str, torch.Tensor] = {}
    for name in names:
        whole |= load_file(run.output / name)
    save_file(whole, run.folder / "joined")
    assert (run.folder / "joined").read_bytes() == one["latents-00000-00.safetensors"]
    assert [row.latent_shard for row in read_manifest(run.output)][:3] == names


def test_keys_keep_their_order_and_fill_up() -> None:
    keys = [str(number) for number in range(100)]
    groups = fill(keys, lambda key: 3.0, 10)
    assert [key for group in groups for key in group] == keys
    assert {len(group) for group in groups[:-1]} == {3}
    assert fill(["large"], lambda key: 99.0, 10) == [["large"]]


def test_nothing_is_encoded_twice(run: Runner, calls: Counter) -> None:
    first = run()
    assert calls == {"frames": 2 * (10 + 11 + 12 + 13 + 14), "texts": 4}
    calls.clear()
    assert run() == first
    assert not calls
    inodes = {path.stat().st_ino for path in (run.folder / ".cache").rglob("*.safetensors")}
    assert {path.stat().st_ino for path in run.output.glob("*.safetensors")} == inodes  # a second name, no copy


def test_a_changed_caption_encodes_that_text_alone(run: Runner, calls: Counter) -> None:
    first = run()
    calls.clear()
    run.parts[1][0] = replace(run.parts[1][0], caption="a green square")
    second = run()
    assert calls == {"texts": 1}
    changed = {name for name, value in second.items() if first[name] != value}
    assert changed == {"text-00001-00.safetensors", "manifest-00001.parquet"}


def test_added_and_moved_clips_encode_only_what_is_new(run: Runner, calls: Counter) -> None:
    added, moved = run.parts[0].pop(0), run.parts[0][-1]
    run()
    calls.clear()
    run.parts = [[added, *run.parts[0][:-1]], [moved, *run.parts[1]]]  # a video came first: all later ones move
    second = run()
    assert calls == {"frames": 2 * added.frames}
    fresh = Runner(run.base, run.folder / "fresh", run.vae, run.text)
    fresh.folder.mkdir()
    fresh.parts = run.parts
    assert fresh() == second  # what was there before does not show


def test_removed_clips_and_other_models_leave_no_old_files(run: Runner, calls: Counter, tmp_path: Path) -> None:
    run()
    cache = run.folder / ".cache"
    before = sorted(cache.glob("latents-*"))
    run.parts[1] = run.parts[1][2:]
    run()
    assert not list(cache.glob("latents-*/latents-00001-*"))
    calls.clear()
    shutil.copytree(run.vae, tmp_path / "other_vae")
    run.vae = tmp_path / "other_vae"
    run()
    assert not calls  # another place, the same weights
    path = next(run.vae.glob("*.safetensors"))
    weights = load_file(path)
    name = next(name for name in weights if name.startswith("encoder") and name.endswith("weight"))
    save_file(weights | {name: weights[name] * 1.5}, path, {"format": "pt"})
    encode._MODELS.clear()
    run()
    assert calls == {"frames": 2 * (10 + 11 + 12)}
    after = sorted(cache.glob("latents-*"))
    assert len(before) == len(after) == 1
    assert before != after


def test_store_dtype_and_sizes_are_part_of_what_is_reused(run: Runner, calls: Counter) -> None:
    run()
    for change in ({"store_dtype": "bfloat16"}, {"store_dtype": "bfloat16", "sizes": ((16, 16),)}):
        calls.clear()
        run(CONFIG.model_copy(update=change))
        assert calls["frames"]
    tensors = load_file(run.output / "latents-00000-00.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_stopped_run_leaves_what_it_made_even_to_another_run(
    run: Runner, calls: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = encode.encode_clip

    def stop(data: bytes, clip: Clip, task: encode.Task) -> dict:
        if clip.clip_id == "c4":
            raise KeyboardInterrupt
        return make(data, clip, task)

    monkeypatch.setattr(encode, "encode_clip", stop)
    monkeypatch.setattr(keyed_files, "fill", lambda keys, size, limit: [[key] for key in keys])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not run.output.exists()
    monkeypatch.setattr(encode, "encode_clip", make)
    calls.clear()
    run.parts[0].reverse()  # another manifest, and files of other clips under the same names
    run(CONFIG.model_copy(update={"shard_mib": 2}))
    assert calls["frames"] == 2 * 14
    assert not list((run.folder / ".cache").glob("*.unfinished"))


def test_a_damaged_old_file_is_made_again(run: Runner, calls: Counter) -> None:
    first = run()
    path = next((run.folder / ".cache").glob("latents-*/latents-00000-*"))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-10])
    calls.clear()
    assert run() == first
    assert calls == {"frames": 2 * (10 + 11 + 12)}


def test_a_copy_where_links_cannot_be_made(run: Runner, calls: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    first = run()
    calls.clear()
    assert run() == first
    assert not calls


def test_bad_clips_are_rows_with_a_reason(run: Runner, calls: Counter) -> None:
    good = run.parts[0]
    run.parts[0] = [
        replace(good[0], frames=11),
        replace(good[1], offset=good[1].offset + 100, size=good[1].size - 100),
        good[2],
    ]
    run()
    rows = read_manifest(run.output)
    assert [row.kept for row in rows] == [False, False, True, True, True, False]
    assert rows[0].reason == "unreadable: 10 of 11 frames decode"
    assert rows[1].reason.startswith("unreadable: ")
    assert run.report.dropped == {"unreadable": 2, "dark": 1}
    assert not rows[0].latent_shard
    assert not rows[0].text_shard
    calls.clear()
    run(CONFIG.model_copy(update={"shard_mib": 2}))
    assert calls["frames"] == 2 * 10  # the bad ones are tried again, the good ones are not


def test_numbers_that_are_not_finite_are_rows_with_a_reason(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = FrameVAE.encode

    def overflow(self: FrameVAE, frames: np.ndarray, micro_batch: int | None = None) -> tuple:
        mean, deviation = vae(self, frames, micro_batch)
        return mean * (1e6 if len(frames) == 10 else 1), deviation

    monkeypatch.setattr(FrameVAE, "encode", overflow)
    run()
    row = read_manifest(run.output)[0]
    assert not row.kept
    assert row.reason.startswith("not finite: latents up to ")
    assert "float16" in row.reason


def test_a_missing_shard_stops_the_step_and_nothing_left_is_an_error(run: Runner, tmp_path: Path) -> None:
    run.base = tmp_path
    with pytest.raises(StepError, match=r"2 of 2 shards failed .*clips-00000-00.tar of clip c0 is missing"):
        run()
    run.parts = [[replace(row, kept=False, reason="dark") for row in part] for part in run.parts]
    with pytest.raises(StepError, match=r"no clip could be encoded \(6 dark\)"):
        run()


def test_clips_of_another_aspect_are_cut_at_the_centre() -> None:
    frames = np.arange(6 * 10)[None, :, None].reshape(1, 6, 10, 1).repeat(3, 3).astype(np.uint8)
    assert cut_centre(frames, (4, 4))[0, :, :, 0].tolist() == [[13 + 10 * y + x for x in range(4)] for y in range(4)]
