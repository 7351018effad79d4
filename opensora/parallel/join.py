"""Joining the process group that torchrun's variables describe, within a time limit; who never came is named."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from opensora.config import ConfigError, TrainConfig, UserError

POLL_S = 0.05


class JoinError(UserError):
    """Processes of the run did not arrive in time; the message names them."""


@dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def read_place(config: TrainConfig) -> Place:
    """The place that RANK, WORLD_SIZE and LOCAL_RANK give; the only process without them.

    Raises:
        ConfigError: there is no such GPU, or samples cannot be shared by that many processes.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size % config.sequence_parallel:
        raise ConfigError(
            f"sequence_parallel {config.sequence_parallel} does not divide the run's {world_size} processes; "
            "start a multiple of it"
        )
    if not torch.cuda.is_available():
        return Place(rank, world_size, local_rank, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, and this machine shows {torch.cuda.device_count()} GPUs; "
            "start one process a GPU"
        )
    return Place(rank, world_size, local_rank, torch.device("cuda", local_rank))


def join(place: Place, config: TrainConfig) -> None:
    """Select the device; with several processes, wait for all of them and make the process group.

    Raises:
        JoinError: some did not arrive in `config.join_timeout_s`.
    """
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    else:
        torch.set_num_threads(config.threads)
    if place.world_size == 1:
        return
    store = _meet(place, config.join_timeout_s)
    dist.init_process_group(
        "nccl" if place.device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=2 * config.stall_timeout_s),  # the watchdog names who is stalled before it all fails
    )


def join_alone(device: torch.device) -> None:
    """The process group of a single process, for libraries that want one."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def _meet(place: Place, limit_s: float) -> dist.Store:
    """A store that every process of the run has signed."""
    deadline = time.monotonic() + limit_s
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ConfigError(f"WORLD_SIZE is {place.world_size}, but {error} is not set; start by torchrun") from None
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then the launcher keeps the store
    try:
        base = dist.TCPStore(
            host,
            port,
            place.world_size,
            is_master=place.rank == 0 and not launched,
            timeout=timedelta(seconds=limit_s),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        keeper = "the launcher" if launched else "rank 0"
        raise JoinError(
            f"rank {place.rank} did not reach {keeper} at {host}:{port} in {limit_s:g} s (join_timeout_s): "
            + str(error).splitlines()[0]
        ) from None
    store = dist.PrefixStore(f"run-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base)
    absent = list(range(place.world_size))
    with suppress(dist.DistError):  # rank 0, which keeps the store, has given up already
        store.set(f"here-{place.rank}", "")
        while absent and time.monotonic() < deadline:
            absent = [rank for rank in absent if not store.check([f"here-{rank}"])]
            time.sleep(POLL_S if absent else 0)
    if absent:
        raise JoinError(
            f"{_ranks(absent)} of {place.world_size} did not arrive in {limit_s:g} s (join_timeout_s); look at the "
            f"logs of those processes, and whether their machines reach {host}:{port}"
        )
    return store


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
