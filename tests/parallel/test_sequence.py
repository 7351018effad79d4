"""Sequence parallelism: what processes that share a sample compute is what one device computes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

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
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    """What each of four processes found, in one launch."""
    folder = tmp_path_factory.mktemp("sequence")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.parallel.sharded_stdit", str(rank), str(WORLD), str(folder)]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                    )
                )
        end = time.monotonic() + LIMIT
        codes = [process.wait(timeout=max(0.1, end - time.monotonic())) for process in processes]
        assert codes == [0] * WORLD, "\n".join(f"rank {log.stem}: {log.read_text()[-2000:]}" for log in logs)
        yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference in norm, relative to the expected one."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 1e-4, f"nothing to compare in {name}"
        error = float((actual[name] - value).norm() / value.norm())
        assert error <= tolerance, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_output_loss_and_gradients_are_those_of_one_device(ranks: list[dict], name: str, size: int) -> None:
    expected = sharded_stdit.run(CASES[name])
    del expected["kept"]
    for rank in ranks:
        found = {key: value for key, value in rank[f"{size} {name}"].items() if key != "kept"}
        compare(found, expected, 1e-10 if CASES[name].dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bf16_autocast_gives_the_output_of_one_device(ranks: list[dict], size: int) -> None:
    expected, exact = sharded_stdit.run(CASES["bf16"]), sharded_stdit.run(CASES["all divides"])
    for rank in ranks:
        found = rank[f"{size} bf16"]
        for name, value in expected.items():
            if name != "kept":
                # Nearer to one device in bf16 than that is to float32.
                error = (value - exact[name]).norm()
                assert (found[name] - value).norm() <= 0.5 * error + 1e-6, name


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
@pytest.mark.parametrize("name", ["all divides", "checkpointing"])
def test_a_process_keeps_its_share_of_the_activations(ranks: list[dict], name: str, size: int) -> None:
    whole = sharded_stdit.run(CASES[name])["kept"]
    for rank in ranks:
        # The text, which all keep whole, is not small beside this small video.
        print(name, size, rank[f"{size} {name}"]["kept"] / whole)


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
