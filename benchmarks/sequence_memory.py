"""How much of a long video's activations a process keeps when 1, 2, 4 and 8 processes share it. Two minutes on a CPU.

    python -m benchmarks.sequence_memory [--processes 1 2 4 8]

One minute of 1080p, scaled down: STDiT with an eighth of XL/2's width and two blocks, 64 frames of 18x32 latents, in as
many gloo processes. Counted, by PyTorch's hooks on saved tensors, is what the forward pass keeps for the backward pass:
every storage once, the model's own parameters and buffers apart. Bytes, not time, so any machine gives the same ratios.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import save
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.parallel.sequence import SequenceGroup, shard_model


@dataclass
class Kept:
    """Storages that a forward pass keeps, by address; held, so that no address is given out twice."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Kept]:
    """Count what is kept for the backward pass within the context, but for the model's own parameters and buffers."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept = Kept()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


CONFIG = STDiTConfig((64, 18, 32), hidden_size=144, depth=2, num_heads=2, caption_channels=512, model_max_length=120)
LIMIT = 600  # seconds, for each number of processes


def kept(processes: int, recompute: bool) -> int:
    """Bytes that this process keeps in one forward pass of the shared video."""
    torch.manual_seed(0)
    model = STDiT(CONFIG)
    group = SequenceGroup(processes) if processes > 1 else None
    if group:
        shard_model(model, group)
    if recompute:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    x, text = torch.randn(1, 4, *CONFIG.input_size), torch.randn(1, 1, 120, 512)
    with saved_bytes(model) as found:
        out = model(x, torch.tensor([500.0]), text)
    out.square().mean().backward()  # the swaps back are part of what must work
    if group:
        group.close()
    return found.total


def work(rank: int, processes: int, folder: Path) -> None:
    """One of the processes; leaves its figures as `<rank>.pt`."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    figures = {name: kept(processes, recompute) for name, recompute in (("none", False), ("full", True))}
    torch.save(figures, folder / f"{rank}.pt")
    if processes > 1:
        dist.destroy_process_group()


def measure(processes: int) -> dict[str, int]:
    """The most bytes that any of so many processes keeps, by kind of recomputation."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "benchmarks.sequence_memory", "--folder", name, "--processes", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = []
        try:
            for rank in range(processes):
                running.append(subprocess.Popen([*command, "--rank", str(rank)], env=environment))
            codes = [process.wait(timeout=LIMIT) for process in running]
            if any(codes):
                raise SystemExit(f"a process of {processes} failed; its own message stands above")
        finally:
            for process in running:
                process.kill()
                process.wait()
        found = [torch.load(Path(name) / f"{rank}.pt") for rank in range(processes)]
    return {kind: max(figures[kind] for figures in found) for kind in found[0]}


def main() -> None:
    """Measure, print a table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank is not None:
        work(chosen.rank, chosen.processes[0], chosen.folder)
        return
    found = {processes: measure(processes) for processes in chosen.processes}
    whole = found[min(found)]
    figures = {}
    for kind in whole:
        for processes, values in found.items():
            name = f"recompute {kind}, {processes} processes"
            ratio = round(values[kind] / whole[kind], 4)
            figures[name] = {"kept_mib": round(values[kind] / 2**20, 2), "ratio": ratio}
            print(f"{name:<32} {values[kind] / 2**20:8.2f} MiB a process   {ratio:.3f}", flush=True)
    print(save("sequence-memory-cpu", {"command": "python -m benchmarks.sequence_memory", "figures": figures}))


if __name__ == "__main__":
    main()
