"""One process of a run for `runs.begin`, which starts it in a copy of a process that has imported everything."""

import os
from pathlib import Path


def train_as(rank: int, world_size: int, port: int, work: Path) -> None:
    """Train in `work` as that rank, without a launcher."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from opensora.training.worker import train_in_process

    train_in_process(work)
