"""Sequence parallelism: what processes that share a sample compute is what one device computes."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache

import pytest
import torch
from torch import Tensor

from opensora.config import ConfigError
from opensora.models.dit import DiT
from opensora.parallel.sequence import SequenceGroup, shard_model
from tests.conftest import ROOT
from tests.parallel import sharded_stdit
from tests.parallel.sharded_stdit import CASES, SAMPLES, Case

WORLD = 4
SIZES = (2, 4)  # processes that share a sample; with two, the four are two data groups
LIMIT = 300  # seconds, for all that the processes do


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four processes found, in one launch."""
    folder = tmp_path_factory.mktemp("sequence")
    command = [sys.executable, "-m", "tests.parallel.sharded_stdit", str(WORLD), str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # all of them can be killed
        )
        try:
            code = process.wait(timeout=LIMIT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, (folder / "log").read_text()[-5000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@cache
def one_device(case: Case) -> dict[str, Tensor]:
    return sharded_stdit.run(case)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference in norm, relative to the expected one."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), f"nothing to compare in {name}"
        error = float((actual[name] - value).norm() / value.norm())
        assert error <= tolerance, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_output_loss_and_gradients_are_those_of_one_device(ranks: list[dict], name: str, size: int) -> None:
    expected = {key: value for key, value in one_device(CASES[name]).items() if key != "kept"}
    for rank in ranks:
        found = {key: value for key, value in rank[f"{size} {name}"].items() if key != "kept"}
        compare(found, expected, 1e-10 if CASES[name].dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bf16_autocast_is_no_further_from_float32_than_on_one_device(ranks: list[dict], size: int) -> None:
    def flat(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for name, value in found.items() if name not in ("out", "loss", "kept")])

    expected, exact = one_device(CASES["bf16"]), one_device(Case())
    error = (expected["out"] - exact["out"]).norm()
    for rank in ranks:
        found = rank[f"{size} bf16"]
        assert (found["out"] - expected["out"]).norm() <= 0.1 * error  # what is exchanged is rounded already
        assert (flat(found) - flat(exact)).norm() <= 1.2 * (flat(expected) - flat(exact)).norm()


@pytest.mark.parametrize("size", SIZES)
def test_guided_sampling_is_that_of_one_device(ranks: list[dict], size: int) -> None:
    expected = sharded_stdit.sample()
    for rank in ranks:
        torch.testing.assert_close(rank[f"{size} guided"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_data_groups_with_samples_of_their_own_average_as_one_batch(ranks: list[dict], engine: str) -> None:
    expected = sharded_stdit.accumulate(SAMPLES)
    for rank in ranks:
        compare(rank[engine], expected, 1e-5)


def test_neighbouring_ranks_share_a_sample(ranks: list[dict]) -> None:
    assert [rank["2 ranks"] for rank in ranks] == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert [rank["4 ranks"] for rank in ranks] == [(0, 1, place, 4) for place in range(4)]


def test_frames_and_locations_are_swapped_once_each_way_a_block(ranks: list[dict]) -> None:
    depth = sharded_stdit.build(Case()).config.depth
    assert [rank["swaps"] for rank in ranks] == [[2 * depth, 2 * depth]] * WORLD


@pytest.mark.parametrize("size", SIZES)
def test_a_process_keeps_its_share_of_the_activations(ranks: list[dict], size: int) -> None:
    whole = one_device(CASES["all divides"])["kept"]
    for rank in ranks:
        # Text and timestep, which every process keeps whole, are not nothing beside this small video.
        assert rank[f"{size} all divides"]["kept"] / whole < 1 / size + 0.05


def test_inputs_that_differ_within_a_group_are_named(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "different inputs: x, y;" in rank["other inputs"]
        assert "x, y, random state" in rank["other captions"]
        assert "data_rank" in rank["other inputs"]


def test_wrong_groups_and_models_are_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "sequence_parallel=3 does not divide the 4 processes" in rank["no divisor"]
    with pytest.raises(ConfigError, match="has joined none"):
        SequenceGroup(2)
    with pytest.raises(ConfigError, match="DiT is not supported"):
        shard_model(DiT(sharded_stdit.build(Case()).config), None)  # type: ignore[arg-type]
