"""The training loop: one stage of STDiT, from its data to its last checkpoint."""

import json
import logging
import math
import signal
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opensora.config import TrainConfig, UserError
from opensora.data.buckets import Plan, draw_seed
from opensora.data.loader import Samples, load_batches
from opensora.diffusion.iddpm import IDDPM
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.stdit import STDiT
from opensora.parallel.engine import Engine
from opensora.progress import track
from opensora.step import StepError
from opensora.tracking import Tracker
from opensora.training.checkpoint import (
    INFO,
    CheckpointError,
    load_weights,
    newest_checkpoint,
    remove_old,
    save_checkpoint,
)
from opensora.training.ema import Ema
from opensora.training.meter import Meter
from opensora.training.step_encoder import StepEncoder

LOSSES = "losses.jsonl"
MAX_BAD_STEPS = 20  # skipped in a row before the run gives up
log = logging.getLogger(__name__)


class Stopped(UserError):
    """SIGTERM or Ctrl-C arrived; a checkpoint was written, and the next start goes on from it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after a checkpoint; start again to resume")
        self.number = number
        self.exit_code = 128 + number


@dataclass
class StopFlag:
    """Set by SIGTERM and SIGINT; the loop looks at it between steps."""

    number: int = 0

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last `decay_share` of the steps."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    decay_steps = config.decay_share * config.steps
    cold = min(1.0, (config.steps - step) / decay_steps) if decay_steps else 1.0
    return config.lr * warm * cold


def build_optimizer(model: STDiT, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW; biases and tables are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def build_objective(config: TrainConfig) -> IDDPM | RectifiedFlow:
    """The process that the stage is trained with."""
    match config.objective:
        case "iddpm":
            return IDDPM()
        case "rectified_flow":
            return RectifiedFlow(shift=config.shift)


@dataclass
class Trainer:
    """One stage in training. `folder` receives checkpoints/ and losses.jsonl; `info` goes into each checkpoint.

    The samples of `data` are latents, or frames that `encoder` encodes in the step.
    """

    config: TrainConfig
    model: STDiT
    data: Samples
    plan: Plan
    engine: Engine
    tracker: Tracker | None
    folder: Path
    info: dict[str, object]
    encoder: StepEncoder | None = None

    def run(self) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint in the folder if there is one; the last metrics.

        Raises:
            Stopped: a signal arrived, and a checkpoint was written.
            StepError: the loss was not finite too many times in a row, data could not be read, or the checkpoint was
                made with other data.
        """
        config, engine = self.config, self.engine
        self.model.to(engine.device).train()
        if config.activation_checkpointing == "full":
            for block in self.model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizer = build_optimizer(self.model, config)
        self.ema = Ema(self.model, config.ema_decay)
        self.forward = engine.prepare(self.model, optimizer)
        objective = build_objective(config)
        start = self._resume()
        stream = load_batches(
            self.data,
            self.plan,
            engine.rank,
            start=start,
            steps=config.steps - start,
            workers=config.loader_workers,
            restarts=config.loader_restarts,
        )
        meter = Meter(config.steps, self._tokens())
        metrics: dict[str, float] = {}
        bad_in_a_row = 0
        with StopFlag() as stop, closing(stream):
            steps: Iterable[int] = range(start, config.steps)
            if engine.rank == 0:
                steps = track(steps, config.steps - start, "training", lines=False)
            for step in steps:
                batch = next(stream)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step)
                loss = self._loss(objective, batch, step)
                engine.backward(loss)
                value = float(loss.detach())
                norm = engine.gradient_norm(config.clip_norm)
                finite = math.isfinite(norm) and math.isfinite(value)
                bad, stopping = engine.any([not finite, bool(stop.number)])
                bad_in_a_row = bad_in_a_row + 1 if bad else 0
                if bad:
                    engine.clear()
                    log.warning("step %d skipped: loss %s, gradient norm %s", step, value, norm)
                else:
                    engine.step()
                    self.ema.update(step)
                if bad_in_a_row >= MAX_BAD_STEPS:
                    raise StepError(
                        f"the loss was not finite in {bad_in_a_row} steps in a row; lower lr or check the data"
                    )

                done = step + 1
                self._record_loss(done, value)
                meter.update(config.batch_size * engine.world_size, value)
                if done % config.log_every == 0 or done == config.steps:
                    rates = meter.read(config.steps - done)
                    metrics = {"loss": rates.pop("loss"), "gradient_norm": norm, "lr": learning_rate(config, step)}
                    self._log(done, metrics | rates)
                if stopping or done % config.checkpoint_every == 0 or done == config.steps:
                    self._save(done)
                if stopping and done < config.steps:
                    raise Stopped(stop.number or signal.SIGTERM)
        return metrics

    def _tokens(self) -> int:
        frames, rows, columns = self.model.config.grid
        return frames * rows * columns

    def _loss(self, objective: IDDPM | RectifiedFlow, batch: dict, step: int) -> Tensor:
        # The caption drop inside the model draws from the global generator.
        torch.manual_seed(draw_seed(self.config.seed, step, self.engine.rank))
        device = self.engine.device
        if self.encoder:
            batch = self.encoder(batch)
        x0 = batch["latent"].to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["noise_seed"]]
        t = torch.cat([objective.sample_timesteps(1, generator) for generator in generators]).to(device)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(device)
        text, mask = batch["text"].unsqueeze(1).to(device), batch["mask"].to(device)
        low = self.config.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            return objective.training_losses(self.forward, x0, t, noise, text, mask)["loss"].mean()

    def _resume(self) -> int:
        """Load the newest undamaged checkpoint; returns its step, 0 without one."""
        folder = self.folder / "checkpoints"
        try:
            path = newest_checkpoint(folder, set_aside=self.engine.rank == 0)
        except CheckpointError:
            self._cut_losses(0)
            return 0
        info = json.loads((path / INFO).read_text())
        step = self.plan.load_state_dict(info["data"])
        load_weights(self.model, path, "model")
        self.ema.load_state_dict(load_file(path / "ema.safetensors"))
        self.engine.load(path / "optimizer.pt")
        rng = torch.load(path / "rng.pt", weights_only=True)
        if self.engine.rank < len(rng):
            torch.set_rng_state(rng[self.engine.rank])
        self._cut_losses(step)
        log.info("resuming from %s", path)
        return step

    def _record_loss(self, step: int, loss: float) -> None:
        if self.engine.rank == 0:
            with (self.folder / LOSSES).open("a") as handle:
                handle.write(json.dumps({"step": step, "loss": loss}) + "\n")

    def _cut_losses(self, step: int) -> None:
        """Forget losses recorded past the checkpoint: they come again. Without a checkpoint that is all of them."""
        path = self.folder / LOSSES
        if self.engine.rank == 0 and path.exists():
            lines = path.read_text().splitlines()[:step]  # one a step; only the last can be torn
            path.write_text("".join(line + "\n" for line in lines))

    def _save(self, step: int) -> None:
        rng = self.engine.gather(torch.get_rng_state())
        if self.engine.rank == 0:
            folder = self.folder / "checkpoints"
            path = save_checkpoint(
                folder,
                step=step,
                model=self.model.state_dict(),
                ema=self.ema.state_dict(),
                rng=rng,
                save_optimizer=self.engine.save,
                info=self.info | {"data": self.plan.state_dict(step)},
            )
            remove_old(folder, self.config.keep_checkpoints)
            if self.tracker:
                digest = json.loads((path / "checkpoint.json").read_text())["sha256"]
                self.tracker.log_checkpoint(path, step, digest)
        self.engine.barrier()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.engine.rank != 0:
            return
        print(
            f"step {step}/{self.config.steps}  loss {metrics['loss']:.4f}  norm {metrics['gradient_norm']:.2f}  "
            f"lr {metrics['lr']:.1e}  {metrics['samples_per_second']:.1f} samples/s  "
            f"{metrics['tokens_per_second']:.0f} tokens/s  {metrics['peak_memory_mib']:.0f} MiB  "
            f"eta {metrics['eta_seconds']:.0f} s",
            flush=True,
        )
        if self.tracker:
            self.tracker.log_metrics(metrics, step)
