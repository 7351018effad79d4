"""Engines: with two processes they train as one device does, and read each other's checkpoints."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from opensora.config import ConfigError, TrainConfig
from opensora.parallel.join import JoinError, Place, join
from opensora.parallel.optimizer import decay_groups
from opensora.parallel.shares import even_ranges, row_ranges
from tests.conftest import ROOT
from tests.parallel.engine_training import LIMIT, Result, build_model, train

BASE = {"accumulate": 2, "weight_decay": 0.1, "clip_norm": LIMIT, "join_timeout_s": 120}


def settings(**fields: object) -> TrainConfig:
    return TrainConfig.model_validate(BASE | fields)


def free_ports(number: int) -> list[str]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run_processes(
    folder: Path,
    jobs: dict[str, tuple[TrainConfig, Result | None]],
    python: str = sys.executable,
    pretended: Sequence[str] = (),
) -> dict[str, Result]:
    """Train every job in two processes, one job after the other, and return what rank 0 left of each.

    Those in `pretended` do as if there were a GPU (pretended_gpu.py).
    """
    for name, (config, start) in jobs.items():
        torch.save({"config": config, "start": start, "pretended": name in pretended}, folder / f"{name}.job")
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "TEST_PORTS": ",".join(free_ports(len(jobs))),
    }
    command = [python, "-m", "tests.parallel.engine_training", str(folder), *jobs]
    workers = [
        subprocess.Popen(command, cwd=ROOT, env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [worker.wait(500) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in jobs}


def assert_same(one: Result, other: Result) -> None:
    torch.testing.assert_close(one.losses, other.losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.norms, other.norms, atol=1e-5, rtol=1e-5)
    for state, expected in zip(
        (one.model, one.optimizer, one.ema), (other.model, other.optimizer, other.ema), strict=True
    ):
        torch.testing.assert_close(without_key_biases(state), without_key_biases(expected), atol=1e-5, rtol=1e-4)


def without_key_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state but for the biases of keys: their true gradient is zero, and of its rounding error Adam makes steps."""
    left = {}
    for name, value in state.items():
        if name.endswith("qkv.bias") and value.ndim:
            query, _, values = value.chunk(3)
            left[name] = torch.cat([query, values])
        elif name.endswith("kv_linear.bias") and value.ndim:
            left[name] = value.chunk(2)[1]
        else:
            left[name] = value
    return left


@dataclass
class Runs:
    """References on one device, and the same trained by two processes."""

    alone: dict[str, Result]
    together: dict[str, Result]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    plain, frozen = settings(), settings(trainable="temporal")
    start = train(plain)
    alone = {"plain": start, "frozen": train(frozen), "resumed": train(plain, start)}
    jobs = {
        "ddp": (plain, None),
        "fsdp": (settings(strategy="fsdp"), None),
        "ddp frozen": (frozen, None),
        "fsdp frozen": (settings(strategy="fsdp", trainable="temporal"), None),
        "ddp resumed": (plain, start),
        "fsdp resumed": (settings(strategy="fsdp"), start),
        "ddp sequence": (settings(sequence_parallel=2), None),
        "fsdp sequence": (settings(strategy="fsdp", sequence_parallel=2), None),
        "fsdp recompute": (settings(strategy="fsdp", activation_checkpointing="full"), None),
        "fsdp bfloat16": (settings(strategy="fsdp", dtype="bfloat16"), None),
    }
    return Runs(alone, run_processes(tmp_path_factory.mktemp("engines"), jobs))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_all_samples(engine: str, runs: Runs) -> None:
    assert runs.alone["plain"].norms[0] > LIMIT  # so that clipping has a say
    assert_same(runs.together[engine], runs.alone["plain"])
    assert runs.together[engine].held * 2 == pytest.approx(runs.alone["plain"].held, rel=0.1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_frozen_parameters_stay_and_are_saved(engine: str, runs: Runs) -> None:
    result = runs.together[f"{engine} frozen"]
    assert_same(result, runs.alone["frozen"])
    before = build_model().state_dict()
    changed = {name for name, value in result.model.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "attn_temp" in name} == set(result.ema)
    assert result.model.keys() == before.keys()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_in_two(engine: str, runs: Runs) -> None:
    assert runs.together[f"{engine} resumed"].kept
    assert_same(runs.together[f"{engine} resumed"], runs.alone["resumed"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(engine: str, runs: Runs) -> None:
    assert_same(train(settings(), runs.together[engine]), runs.alone["resumed"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_engines_share_samples_between_processes(engine: str, runs: Runs) -> None:
    assert_same(runs.together[f"{engine} sequence"], runs.alone["plain"])


def test_fsdp_recomputes_blocks(runs: Runs) -> None:
    assert_same(runs.together["fsdp recompute"], runs.alone["plain"])


def test_fsdp_in_bfloat16_keeps_float32_weights(runs: Runs) -> None:
    result, expected = runs.together["fsdp bfloat16"], train(settings(dtype="bfloat16"))
    torch.testing.assert_close(result.losses, expected.losses, atol=0.02, rtol=0.02)
    weights = result.model["blocks.0.mlp.fc1.weight"]
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, weights.bfloat16().float())


def test_a_state_that_does_not_fit_is_named() -> None:
    result = train(settings())
    result.model["final_layer.linear.bias"] = torch.zeros(3)
    del result.model["t_block.1.bias"]
    with pytest.raises(
        ConfigError, match=r"t_block.1.bias is missing; final_layer.linear.bias has shape \[3\] instead"
    ):
        train(settings(), result)


def test_who_never_came_is_named() -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", free_ports(1)[0]
    errors: dict[int, str] = {}

    def arrive(rank: int, processes: int, seconds: int = 5) -> None:
        try:
            join(Place(rank, processes, 0, torch.device("cpu")), settings(join_timeout_s=seconds))
        except JoinError as error:
            errors[rank] = str(error)

    threads = [Thread(target=arrive, args=(rank, 4)) for rank in (0, 2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        arrive(1, 2, seconds=1)
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    assert errors[0].startswith("ranks 1, 3 of 4 did not arrive in 5 s (join_timeout_s)")
    assert errors[2].startswith("ranks 1, 3 of 4")
    assert errors[1].startswith("rank 1 did not reach rank 0 at localhost:")


def test_processes_that_cannot_share_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="sequence_parallel 2 does not divide the run's 3 processes"):
        train(settings(sequence_parallel=2))


def test_biases_and_tables_are_not_decayed() -> None:
    model = build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in decay_groups(model, 0.1))
    assert all(name.endswith(("bias", "scale_shift_table")) for name in kept)
    assert all(name.endswith("weight") for name in decayed)
    assert len(decayed) + len(kept) == len(names)


def test_ranges_cover_every_parameter_once() -> None:
    shapes = {"a": torch.Size([7, 3]), "b": torch.Size([1]), "c": torch.Size([5])}
    for ranges in (even_ranges(shapes, 4), row_ranges(shapes, 4)):
        for name, shape in shapes.items():
            parts = sorted(part[name] for part in ranges if name in part)
            assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
            assert parts[-1][1] == shape.numel()
    assert [sum(stop - start for start, stop in part.values()) for part in even_ranges(shapes, 4)] == [6, 7, 7, 7]
