"""The training loop: one stage of STDiT, from its data to its last checkpoint."""

import logging
import signal
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.config import HardwareConfig, TrainConfig
from opensora.data.buckets import Plan, draw_seed
from opensora.data.loader import Samples, load_batches
from opensora.diffusion.iddpm import IDDPM
from opensora.diffusion.rectified_flow import RectifiedFlow
from opensora.models.checkpointing import set_activation_checkpointing
from opensora.models.stdit import STDiT
from opensora.parallel.engine import Engine
from opensora.progress import progress
from opensora.step import StepError
from opensora.tracking.tracker import Tracker
from opensora.training.checkpoint import EMA, MODEL, OPTIMIZER, RNG, check_same, find_newest, read_info, step_of
from opensora.training.compiling import compile_blocks
from opensora.training.ema import Ema
from opensora.training.freeze import freeze
from opensora.training.health import Health
from opensora.training.journal import Journal
from opensora.training.meter import Meter, describe_rates, sample_work
from opensora.training.samples import SampleWriter
from opensora.training.saver import Saver, Snapshot
from opensora.training.step_encoder import StepEncoder
from opensora.training.stop import StopFlag, Stopped
from opensora.training.together import on_rank_zero
from opensora.training.watchdog import Watchdog

log = logging.getLogger(__name__)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay over the last `decay_share` of the steps."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    decay_steps = config.decay_share * config.steps
    cold = min(1.0, (config.steps - step) / decay_steps) if decay_steps else 1.0
    return config.lr * warm * cold


def build_objective(config: TrainConfig) -> IDDPM | RectifiedFlow:
    """The process that the stage is trained with."""
    match config.objective:
        case "iddpm":
            return IDDPM()
        case "rectified_flow":
            return RectifiedFlow(shift=config.shift)


@dataclass(frozen=True)
class Passes:
    """The forward and backward passes of a step in this process."""

    loss: float  # mean over its micro-batches
    position: int  # of the samples in the data
    samples: int  # in its micro-batches together
    size: tuple[int, int, int]  # of each sample's latents: T, h, w


@dataclass
class Trainer:
    """One stage in training. `folder` receives checkpoints/, samples/ and losses.jsonl.

    Args:
        data: its samples are latents, or frames that `encoder` encodes in the step.
        info: goes into each checkpoint: configuration, stage, lineage, and where generation finds the other models.
        tracker: on rank 0.
        samples: makes the samples of `sample_every`.
    """

    config: TrainConfig
    model: STDiT
    data: Samples
    plan: Plan
    engine: Engine
    folder: Path
    info: dict[str, object]
    hardware: HardwareConfig
    tracker: Tracker | None = None
    encoder: StepEncoder | None = None
    samples: SampleWriter | None = None

    def run(self) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint in the folder if there is one; the last metrics.

        Raises:
            Stopped: a signal arrived, and a checkpoint was written.
            StepError: steps were bad too many times, data could not be read, or the checkpoint was made with other
                data.
            CheckpointError: one could not be written, or is of another model, stage or version.
        """
        config, engine = self.config, self.engine
        self.model.to(engine.device).train()
        freeze(self.model, config.trainable)
        set_activation_checkpointing(self.model, config.activation_checkpointing)
        self.forward = engine.prepare(self.model, config)
        if config.compile:
            compile_blocks(self.model)
        self.ema = Ema(engine.own_parameters(), config.ema_decay)
        self.objective = build_objective(config)
        self.health = Health(config, self.folder, engine.rank)
        self.meter = Meter(engine.world_size, self.hardware, engine.device)
        self.work = sample_work(self.model.config, config)
        self.journal = Journal(self.folder) if engine.rank == 0 else None
        self.checkpoints = self.folder / "checkpoints"
        self.saver = Saver(self.checkpoints, config.keep_checkpoints, config.keep_every, self._track_checkpoint)
        self.metrics: dict[str, float] = {}
        self.step = self.position = 0
        self.meter.load_state_dict(self._load(self._newest()).get("meter", {}))
        with StopFlag() as stop, self.saver, Watchdog(config.stall_timeout_s, engine.rank, self.folder) as watchdog:
            while self.step < config.steps:  # anew after each rollback
                with closing(self._batches()) as batches:
                    self._train(batches, stop, watchdog)
            on_rank_zero(engine, self.saver.wait)
        self._track_cost()
        return self.metrics

    def _train(self, batches: Iterator[dict[str, Any]], stop: StopFlag, watchdog: Watchdog) -> None:
        """Steps until the last one, or until the run has gone back to a checkpoint."""
        config, engine, health = self.config, self.engine, self.health
        bar = progress(config.steps - self.step, "training", lines=False)
        with bar if engine.rank == 0 else nullcontext(lambda: None) as advance:
            while self.step < config.steps:
                passes = self._accumulate(batches)
                norm = engine.gradient_norm(config.clip_norm)
                # One exchange a step: every process sees the same numbers, and comes to the same verdict.
                loss, stopping, failed = engine.mean([passes.loss, float(stop.number), float(self.saver.failed)])
                good = health.judge(loss, norm) == "ok"
                if good:
                    engine.step(learning_rate(config, self.step))
                    self.ema.update(self.step)
                    health.good(norm)
                else:
                    engine.clear()
                    health.bad(self.step, passes.position, self.plan.clip_ids(passes.position), loss, norm)
                    log.warning("step %d skipped: loss %s, gradient norm %s", self.step + 1, loss, norm)

                self.step, self.position = self.step + 1, passes.position + 1
                self._record(passes, loss, norm, good)
                watchdog.beat(self.step)
                advance()
                if failed:
                    on_rank_zero(engine, self.saver.wait)  # says why
                if health.must_roll_back:
                    self._roll_back()
                    return
                last = self.step == config.steps
                if last or (good and (stopping or self.step % config.checkpoint_every == 0)):
                    self._save()
                if self.samples and self.step % config.sample_every == 0:
                    self._sample(self.samples, watchdog)
                if stopping and not last:
                    on_rank_zero(engine, self.saver.wait)
                    self._track_cost()
                    raise Stopped(stop.number or signal.SIGTERM)

    def _accumulate(self, batches: Iterator[dict[str, Any]]) -> Passes:
        """Add up the gradients of a step's micro-batches. Collective in the last one."""
        config, losses, samples = self.config, [], 0
        for number in range(config.accumulate):
            batch = next(batches)
            position = batch["position"]
            if self.encoder:
                batch = self.encoder(batch)
            with self.engine.accumulating(last=number + 1 == config.accumulate):
                # The caption drop inside the model draws from the global generator; processes that share samples agree.
                place = self.step * config.accumulate + number
                torch.manual_seed(draw_seed(config.seed, place, self.engine.data_rank))
                loss = self._loss(batch) / config.accumulate
                self.engine.backward(loss)
            losses.append(loss.detach())
            samples += len(batch["latent"])
        _, _, frames, rows, columns = batch["latent"].shape
        return Passes(float(torch.stack(losses).sum()), position, samples, (frames, rows, columns))

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a micro-batch."""
        device = self.engine.device
        x0 = batch["latent"].to(device, non_blocking=True)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["noise_seed"]]
        t = torch.cat([self.objective.sample_timesteps(1, generator) for generator in generators]).to(device)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(device)
        text, mask = batch["text"].unsqueeze(1).to(device), batch["mask"].to(device)
        low = self.config.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            return self.objective.training_losses(self.forward, x0, t, noise, text, mask)["loss"].mean()

    def _batches(self) -> Generator[dict[str, Any]]:
        config, engine = self.config, self.engine
        return load_batches(
            self.data,
            self.plan,
            engine.data_rank,
            start=self.position,
            steps=config.steps - self.step,
            workers=config.loader_workers,
            restarts=config.loader_restarts,
            skip=self.health.skip,
        )

    def _newest(self) -> Path | None:
        """The newest undamaged checkpoint, whose hashes rank 0 reads. Collective."""
        on_rank_zero(self.engine, lambda: find_newest(self.checkpoints, tidy=True))
        return find_newest(self.checkpoints, verify=False)

    def _load(self, path: Path | None) -> dict[str, Any]:
        """Go on from a checkpoint, and return what it says of itself; without one, from the start. Collective."""
        engine, info = self.engine, {}
        if path is not None:
            info = read_info(path, verify=False)
            check_same(path, info, str(self.info["stage"]), self.model.config)
            self.step, self.position = info["step"], self.plan.load_state_dict(info["data"])
            engine.load_model_state(load_file(path / MODEL))
            self.ema.load(engine.distribute(load_file(path / EMA)))
            engine.load_optimizer_state(load_file(path / OPTIMIZER))
            self.health.load_state_dict(info["health"])
            self.metrics = info["metrics"]
            log.info("resuming from %s", path)
        if self.journal:
            self.journal.cut(self.step)
        if path is not None:
            self._restore_random_states(load_file(path / RNG))  # last: loading may draw
        return info

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, and past the data of the bad steps. Collective.

        Raises:
            StepError: there is none, or the run went back too often.
        """
        on_rank_zero(self.engine, self.saver.wait)
        path = self._newest()
        if path is None:
            raise StepError(
                f"steps {self.health.first_bad_step + 1} to {self.step} were bad, and there is no checkpoint before "
                f"them; lower lr or look at the clips in {self.health.path}"
            )
        self.health.roll_back(step_of(path))
        log.warning("going back from step %d to %s, past the data of the bad steps", self.step, path)
        self._load(path)

    def _save(self) -> None:
        """Take a snapshot, which the saver writes while training goes on. Collective."""
        engine = self.engine
        info = {
            "data": self.plan.state_dict(self.position),
            "health": self.health.state_dict(),
            "meter": self.meter.state_dict(),
            "metrics": self.metrics,
        }
        snapshot = Snapshot(
            step=self.step,
            model=engine.model_state(),
            ema=engine.collect(self.ema.shares()),
            optimizer=engine.optimizer_state(),
            rng=self._random_states(),
            info=self.info | info,
        )
        on_rank_zero(engine, lambda: self.saver.save(snapshot))

    def _random_states(self) -> dict[str, Tensor]:
        """`RANK/KIND` of every process, on rank 0. Collective."""
        states = {"cpu": torch.get_rng_state()}
        if self.engine.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.engine.device)
        parts = {kind: self.engine.gather(state) for kind, state in states.items()}
        return {f"{rank}/{kind}": state for kind, of in parts.items() for rank, state in enumerate(of)}

    def _restore_random_states(self, states: dict[str, Tensor]) -> None:
        """Of this process, if the checkpoint's run had so many; each step is seeded by its number anyway."""
        rank, device = self.engine.rank, self.engine.device
        if f"{rank}/cpu" in states:
            torch.set_rng_state(states[f"{rank}/cpu"])
        if f"{rank}/cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states[f"{rank}/cuda"], device)

    def _track_checkpoint(self, path: Path) -> None:
        if self.tracker:
            info = read_info(path, verify=False)
            self.tracker.log_checkpoint(path, info["step"], info["sha256"])

    def _track_cost(self) -> None:
        if self.tracker and (cost := self.meter.cost()):
            self.tracker.log_metrics(cost, self.step)

    def _sample(self, samples: SampleWriter, watchdog: Watchdog) -> None:
        """Samples by rank 0, with averaged weights, while the others wait. Collective."""
        weights = self.engine.model_state() | self.engine.collect(self.ema.shares())
        step = self.step
        on_rank_zero(self.engine, lambda: samples.write(weights, step, lambda: watchdog.beat(step)))
        watchdog.beat(step)

    def _record(self, passes: Passes, loss: float, norm: float, good: bool) -> None:
        """The journal's line of a step, and at intervals what the meter says."""
        config, step = self.config, self.step
        if good:
            samples = passes.samples * self.engine.data_world_size
            tokens, flops = self.work(passes.size)
            self.meter.update(samples, loss, samples * tokens, samples * flops)
        if self.journal:
            self.journal.record(step, loss, skipped=not good)
        if step % config.log_every and step != config.steps:
            return
        rates = self.meter.read(config.steps - step)
        self.metrics = {"loss": rates.pop("loss"), "gradient_norm": norm, "lr": learning_rate(config, step - 1)}
        if self.engine.rank == 0:
            self._log(step, self.metrics | rates)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        print(
            f"step {step}/{self.config.steps}  loss {metrics['loss']:.4f}  norm {metrics['gradient_norm']:.2f}  "
            f"lr {metrics['lr']:.1e}  {describe_rates(metrics)}",
            flush=True,
        )
        if self.tracker:
            self.tracker.log_metrics(metrics, step)
