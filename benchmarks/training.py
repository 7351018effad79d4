"""What training costs beside its matrix products: the loop round a step, saving, and selective checkpointing.

    python -m benchmarks.training        # seven minutes on two CPU cores; benchmarks/results/training-cpu.json

Every figure is a ratio of times measured in one run with one thread. The loop trains a small STDiT from latents and
leaves what a stage leaves: losses, log lines, averages, checkpoints.
"""

import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, save
from benchmarks.stdit import build, inputs, step
from opensora.config import Config, load_config
from opensora.data.buckets import Plan, stage_buckets
from opensora.data.dataset import LatentDataset
from opensora.data.shards import text_key, write_tensors
from opensora.manifest import Clip, part_name, write_part
from opensora.models.checkpointing import MODES, set_activation_checkpointing
from opensora.models.stdit import STDiT
from opensora.parallel.engine import build_engine
from opensora.training.checkpoint import stdit_config
from opensora.training.train import Passes, Trainer, build_objective
from tests.live_bytes import LiveBytes

STAGE, SCALE, SIDE, FRAMES, TEXT = "train_video", 4, 64, 8, 64
STEPS, ROUNDS = 24, 3


def settings(checkpoint_every: int) -> Config:
    """A stage of 8 frames of 16x16 latents, batch 2: 1,024 tokens a step for 7 million parameters."""
    values = {
        "model.hidden_size": 192,
        "model.depth": 8,
        "model.num_heads": 4,
        f"{STAGE}.frames": FRAMES,
        f"{STAGE}.height": SIDE,
        f"{STAGE}.width": SIDE,
        f"{STAGE}.batch_size": 2,
        f"{STAGE}.steps": STEPS,
        f"{STAGE}.log_every": 1,
        f"{STAGE}.checkpoint_every": checkpoint_every,
        f"{STAGE}.threads": 1,
    }
    return load_config(Path("params.yaml"), "smoke", tuple(f"{name}={value}" for name, value in values.items()))


def encoded(folder: Path) -> Path:
    """Latents and texts of 16 clips, as the encode step leaves them."""
    clips, tensors, texts = [], {}, {}
    for index in range(16):
        name, shape = f"clip{index}", (2 * FRAMES, 4, SIDE // SCALE, SIDE // SCALE)
        tensors[f"{name}/{SIDE}x{SIDE}/mean"] = torch.randn(shape).half()
        tensors[f"{name}/{SIDE}x{SIDE}/std"] = torch.full(shape, 0.1).half()
        texts[text_key(name)] = torch.randn(6, TEXT).half()
        about = {"frames": shape[0], "height": SIDE, "width": SIDE, "caption": name}
        clips.append(Clip(name, "x", **about, latent_shard="l", text_shard="t"))
    write_tensors(folder / "l", tensors)
    write_tensors(folder / "t", texts)
    write_part(folder / part_name(0), clips)
    return folder


@dataclass
class TimedTrainer(Trainer):
    """Keeps the CPU and wall time at the end of every step."""

    times: list[tuple[float, float]] = field(default_factory=list)

    def _record(self, passes: Passes, loss: float, norm: float, good: bool) -> None:
        super()._record(passes, loss, norm, good)
        self.times.append((time.process_time(), time.perf_counter()))


def run_loop(config: Config, data: Path, work: Path) -> list[tuple[float, float]]:
    """Train the stage; CPU and wall seconds from the end of each step to the next, the first three left out."""
    train = config.train_video
    buckets = stage_buckets(train)
    latents = LatentDataset(data, buckets, config.encode.max_tokens)
    engine = build_engine(train)
    work.mkdir()
    torch.manual_seed(0)
    trainer = TimedTrainer(
        config=train,
        model=STDiT(stdit_config(config, STAGE, SCALE)),
        data=latents,
        plan=Plan(latents.clips, buckets, train.seed, 1),
        engine=engine,
        folder=work,
        info={"config": config.model_dump(mode="json"), "stage": STAGE, "vae_scale": SCALE},
        hardware=config.hardware,
    )
    with redirect_stdout(io.StringIO()):
        trainer.run()
    engine.close()
    ends = trainer.times[3:]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(ends[:-1], ends[1:], strict=True)]


class BareStep:
    """Forward, backward, clipping and AdamW on one batch that is there already."""

    def __init__(self, config: Config) -> None:
        train = config.train_video
        torch.manual_seed(0)
        self.model = STDiT(stdit_config(config, STAGE, SCALE)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=train.lr, fused=True)
        self.objective = build_objective(train)
        shape, length = (train.batch_size, *(4, FRAMES, SIDE // SCALE, SIDE // SCALE)), config.model.model_max_length
        self.batch = torch.randn(shape), torch.rand(train.batch_size), torch.randn(shape)
        self.text = torch.randn(train.batch_size, 1, length, TEXT), torch.ones(train.batch_size, length)

    def __call__(self) -> None:
        self.objective.training_losses(self.model, *self.batch, *self.text)["loss"].mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def loop(folder: Path) -> dict[str, float]:
    """A step of the loop over a bare step, CPU time; and the wall time that a checkpoint adds, in steps."""
    data, bare = encoded(folder), BareStep(settings(STEPS))
    whole: list[float] = []
    alone: list[float] = []
    costs: list[float] = []
    for number in range(ROUNDS):
        torch.set_num_threads(1)
        for _ in range(STEPS):
            start = time.process_time()
            bare()
            alone.append(time.process_time() - start)
        plain = run_loop(settings(STEPS), data, folder / f"plain{number}")
        whole += [cpu for cpu, _ in plain]
        saving = [wall for _, wall in run_loop(settings(6), data, folder / f"saving{number}")]
        usual = statistics.median(wall for _, wall in plain)
        costs.append((sum(saving) - len(saving) * usual) / usual / (STEPS // 6 - 1))  # the last one falls past the end
    return {
        "seconds_a_step": statistics.median(alone),
        "step of the loop / bare step": statistics.median(whole) / statistics.median(alone),
        "steps that an asynchronous checkpoint costs": statistics.median(costs),
    }


def checkpointing() -> dict[str, float]:
    """Memory that a forward pass leaves, and CPU time of a step, over those without checkpointing; XL/2, two blocks."""
    figures = {}
    arguments = inputs(16)
    for low, name in ((False, "float32"), (True, "bf16 autocast")):
        model = build(STDiT, 16)

        def one(mode: str, model: nn.Module = model, low: bool = low) -> None:
            set_activation_checkpointing(model, mode)  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                step(model, *arguments)

        left = {}
        for mode in MODES:
            set_activation_checkpointing(model, mode)
            with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss: Tensor = model(*arguments).square().mean()
                left[mode] = live.now
            del loss
        times = alternate({mode: lambda m=mode: one(m) for mode in MODES}, 3)  # type: ignore[misc]
        for mode in ("selective", "full"):
            figures[f"{mode}, {name}: memory"] = left[mode] / left["none"]
            figures[f"{mode}, {name}: time"] = times[mode] / times["none"]
    return figures


def main() -> None:
    """Measure, print and keep it."""
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (lambda: loop(Path(folder)), checkpointing):
            for name, value in part().items():
                figures[name] = round(value, 4)
                print(f"{name:<50} {value:.3f}", flush=True)
    print(json.dumps(figures))
    print(save("training-cpu", {"command": "python -m benchmarks.training", "figures": figures}))


if __name__ == "__main__":
    main()
