"""The three stages: what each starts from, the processes it runs in, and the folder it leaves."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config import TRAIN_STEPS, Config, TrainConfig
from opensora.launch import launch_here
from opensora.process import end_with_parent
from opensora.step import FINGERPRINT, Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.tracking.lineage import lineage
from opensora.training.stop import SIGNALS, Stopped

JOB = "job.json"
RESULT = "result.json"
STOPPED = "stopped.json"  # the signal that stopped the processes, after their checkpoint
# What may change in a run that goes on, as it changes no sample, and numbers by no more than rounding. What makes the
# global batch is compared as that.
FREE = {
    *("engine", "strategy", "sequence_parallel", "activation_checkpointing", "compile", "processes", "threads"),
    *("accumulate", "loader_workers", "loader_restarts", "log_every", "sample_every", "sample_prompts"),
    *("checkpoint_every", "keep_checkpoints", "keep_every", "max_rollbacks", "stall_timeout_s", "join_timeout_s"),
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a stage's samples come from: the encode step's shards, or clips that are encoded in the step."""

    manifest: Path  # folder of the encode step; of the caption step for clips
    shards: Path | None = None  # folder of the split step, for clips
    vae: Path | None = None  # folders of the models, for clips
    text: Path | None = None

    def resolved(self) -> dict[str, str]:
        """The paths that there are, absolute, for another process."""
        return {name: str(path.resolve()) for name, path in vars(self).items() if path}


def run(config: Config, stage: str, source: Source, previous: Path | None, output: Path, root: Path) -> Report:
    """Train one stage and leave `output/checkpoints`.

    This process trains, or starts `processes` that do. One that a launcher started beside others, as torchrun's
    variables RANK and WORLD_SIZE say, trains together with them, each of which calls this function.

    Args:
        stage: `train_image`, `train_video` or `train_highres`.
        source: for the stage's `data`; clips need all of it.
        previous: folder of the stage before, whose averaged weights this one starts from; None for the first.
        output: final folder of the step.
        root: folder of all results, where the tracking store lies by default.

    Raises:
        ConfigError: the GPU cannot hold it; nothing was loaded.
        StepError: a process failed, or a run with other values was stopped in the step's folder.
        Stopped: a signal arrived; the next start goes on from the checkpoint.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched:
        train = getattr(config, stage).model_copy(update={"processes": int(os.environ["WORLD_SIZE"])})
        config = config.model_copy(update={stage: train})
    folder = _folder(config, stage, source, previous, output)
    job = {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "source": source.resolved(),
        "previous": str(previous.resolve()) if previous else "",
        "root": str(root.resolve()),
        "lineage": lineage() | {"data_fingerprint": _fingerprint_of(source.manifest)},
    }
    if launched:
        return _join(folder, job, getattr(config, stage))
    if folder.is_done():
        return read_report(output)
    alone = getattr(config, stage).processes == 1
    if config.hardware.gpu and not alone:  # a process that trains looks at its own GPU; this one needs no PyTorch
        from opensora.plan import check_fits

        check_fits(config, stage)
    _open(folder, job)
    if alone:
        from opensora.training.worker import train_in_process

        train_in_process(folder.path)
    else:
        _launch(folder.path, getattr(config, stage).processes)
    return _finish(folder)


def finished(config: Config, stage: str, source: Source, previous: Path | None, output: Path) -> Report | None:
    """The report of the stage if `output` holds what `run` would leave there: nothing need be started to find out."""
    folder = _folder(config, stage, source, previous, output)
    return read_report(output) if folder.is_done() else None


def _folder(config: Config, stage: str, source: Source, previous: Path | None, output: Path) -> StepFolder:
    before = read_report(previous).metrics if previous else {}
    read_report(source.manifest)
    data = _fingerprint_of(source.manifest)
    return StepFolder(output, fingerprint(stage, deciding(config, stage), before, data))


def _fingerprint_of(step: Path) -> str:
    return json.loads((step / FINGERPRINT).read_text())


def deciding(config: Config, stage: str) -> dict[str, object]:
    """The values that decide what a stage trains: its own, but for those that are `FREE`, and the model's."""
    train: TrainConfig = getattr(config, stage)
    at_once = train.accumulate * train.processes // train.sequence_parallel
    values = train.model_dump(mode="json", exclude=FREE)
    for shape in (values, *values["buckets"]):
        shape["batch_size"] *= at_once
    values["image_batch_size"] *= at_once if train.image_share else 0
    return values | {f"model.{name}": value for name, value in config.model.model_dump(mode="json").items()}


def _open(folder: StepFolder, job: Mapping[str, Any]) -> None:
    """The step's work folder with the job in it.

    Raises:
        StepError: it holds checkpoints of a run with other values, which would be lost.
    """
    _refuse_other(folder, job)
    if job["lineage"].get("git_commit") == "unknown" and "image_digest" not in job["lineage"]:
        log.warning(
            "neither a git commit nor an image's digest says which code trains; `promote` will refuse the result"
        )
    work = folder.open()
    (work / STOPPED).unlink(missing_ok=True)
    write_json(work / JOB, job)


def _refuse_other(folder: StepFolder, job: Mapping[str, object]) -> None:
    from opensora.config import build_config
    from opensora.training.checkpoint import find_newest, read_info

    mark = folder.path / FINGERPRINT
    path = find_newest(folder.path / "checkpoints", verify=False)
    if path is None or (mark.is_file() and json.loads(mark.read_text()) == folder.key):
        return
    stage = str(job["stage"])
    there = deciding(build_config(read_info(path, verify=False)["config"]), stage)
    here = deciding(build_config(job["config"]), stage)  # type: ignore[arg-type]
    names = [name for name in here if here[name] != there.get(name)]
    changes = ", ".join(f"{name} {there.get(name)} there and {here[name]} here" for name in names)
    raise StepError(
        f"{folder.path} holds checkpoints of a stopped run with {'other values' if names else 'other data'}"
        f"{f' ({changes})' if names else ', or from another stage before'}; go on with those, or delete that folder "
        "to start anew"
    )


def _finish(folder: StepFolder) -> Report:
    work = folder.path
    result = json.loads((work / RESULT).read_text())
    (work / JOB).unlink()
    (work / RESULT).unlink()
    kept, excluded = result["clips"], result["excluded"]
    total = kept + sum(excluded.values())
    return folder.finish(
        Report(folder.output.name, total=total, kept=kept, dropped=excluded, metrics=result["metrics"])
    )


def _join(folder: StepFolder, job: Mapping[str, object], train: TrainConfig) -> Report:
    """Train together with the processes that a launcher started; rank 0 looks after the folder."""
    from opensora.parallel.engine import build_engine
    from opensora.training.together import on_rank_zero
    from opensora.training.worker import train_in_process

    end_with_parent()
    engine = build_engine(train)
    try:
        (done,) = engine.any([engine.rank == 0 and folder.is_done()])
        if not done:
            on_rank_zero(engine, lambda: _open(folder, job))
            train_in_process(folder.path, engine)
            on_rank_zero(engine, lambda: _finish(folder))
    except Stopped as stopped:
        if engine.rank:
            raise SystemExit(stopped.exit_code) from None  # rank 0 says it
        raise
    finally:
        engine.close()
    return read_report(folder.output)


def _launch(work: Path, processes: int) -> None:
    """Run the stage in several processes of this machine and wait.

    Raises:
        StepError: a process failed.
        Stopped: a signal arrived, and a checkpoint was written.
        SystemExit: a signal arrived before the first step.
    """
    code = launch_here(processes, "opensora.training.worker", str(work))
    if code and (work / STOPPED).is_file():
        raise Stopped(json.loads((work / STOPPED).read_text()))
    if code in [128 + number for number in SIGNALS]:
        raise SystemExit(code)
    if code:
        error = StepError("a training process failed; the lines above say why, and a new start resumes")
        error.exit_code = code
        raise error


def stage_before(stage: str) -> str | None:
    """The stage whose weights `stage` starts from."""
    index = TRAIN_STEPS.index(stage)
    return TRAIN_STEPS[index - 1] if index else None
