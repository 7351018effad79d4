"""Checkpoints on disk: whole or not there, found to be damaged, refused where they do not fit, kept as asked."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora.config import load_config
from opensora.training.checkpoint import (
    INFO,
    CheckpointError,
    DamagedError,
    check_same,
    find_newest,
    newest_checkpoint,
    read_info,
    remove_old,
    save_checkpoint,
    stdit_config,
)
from tests.conftest import ROOT

CONFIG = load_config(ROOT / "params.yaml", "smoke")
DESCRIPTION = {"config": CONFIG.model_dump(mode="json"), "stage": "train_video", "vae_scale": 4}


def save(folder: Path, step: int, size: int = 10) -> Path:
    weights = {"a": torch.full((size,), float(step))}
    rng = {"0/cpu": torch.get_rng_state()}
    return save_checkpoint(folder, step=step, model=weights, ema=weights, optimizer={}, rng=rng, info=DESCRIPTION)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow past 64 KiB: writing fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    info = read_info(save(tmp_path, 3))
    assert set(info["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "rng.safetensors"}
    assert (info["version"], info["step"], info["stage"]) == (2, 3, "train_video")
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.usefixtures("small_files")
def test_what_cannot_be_written_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*File too large"):
        save(tmp_path, 2, size=1 << 16)
    assert names(tmp_path) == [before.name]
    assert newest_checkpoint(tmp_path) == before


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", INFO])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_set_aside(file: str, how: str, tmp_path: Path) -> None:
    good, bad = save(tmp_path, 9), save(tmp_path, 10)
    (tmp_path / ".step-00000011.part").mkdir()
    data = bytearray((bad / file).read_bytes())
    data[len(data) // 2] ^= 1
    match how:
        case "flipped":
            (bad / file).write_bytes(data)
        case "cut":
            (bad / file).write_bytes(data[: len(data) // 2])
        case "gone":
            (bad / file).unlink()
    if file == INFO and how == "flipped":  # a hash of itself it does not hold: any that it does hold
        (bad / file).write_text((bad / file).read_text().replace('"sha256": "', '"sha256": "0', 1))
    assert find_newest(tmp_path) == good
    assert names(tmp_path)[1:] == ["step-00000009", "step-00000010"]
    assert find_newest(tmp_path, tidy=True) == good
    assert names(tmp_path) == ["damaged-step-00000010", "step-00000009"]


def test_another_version_is_an_error_and_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    info = json.loads((path / INFO).read_text())
    (path / INFO).write_text(json.dumps(info | {"version": 1}))
    with pytest.raises(CheckpointError, match="has checkpoint version 1, and this program reads version 2; train") as e:
        find_newest(tmp_path, tidy=True)
    assert not isinstance(e.value, DamagedError)
    assert names(tmp_path) == ["step-00000001"]


def test_no_checkpoint_is_an_error_where_one_is_needed(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="train that stage first"):
        newest_checkpoint(tmp_path / "none")


def test_the_newest_and_every_multiple_are_kept(tmp_path: Path) -> None:
    for step in range(1, 13):
        save(tmp_path, step)
        remove_old(tmp_path, keep=2, every=5)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (5, 10, 11, 12)]
    remove_old(tmp_path, keep=1)
    assert names(tmp_path) == ["step-00000012"]


def test_steps_are_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path).name == "step-100000000"


def test_a_checkpoint_of_another_stage_or_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    own = stdit_config(CONFIG, "train_video", 4)
    check_same(path, DESCRIPTION, "train_video", own)
    with pytest.raises(CheckpointError, match="stage train_video there and train_image here"):
        check_same(path, DESCRIPTION, "train_image", own)
    wide = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"hidden_size": 64, "depth": 3})})
    with pytest.raises(CheckpointError, match="hidden_size 32 there and 64 here, depth 2 there and 3 here"):
        check_same(path, DESCRIPTION, "train_video", stdit_config(wide, "train_video", 4))


def test_an_old_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, size=4)
    path = save(tmp_path, 1, size=8)
    assert len(load_file(path / "model.safetensors")["a"]) == 8
