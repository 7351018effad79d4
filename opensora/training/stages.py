"""The three stages: what each starts from, the processes it runs in, and the folder it leaves."""

import json
import logging
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.config import TRAIN_STEPS, Config, TrainConfig, UserError, build_config
from opensora.process import end_with_parent
from opensora.step import FINGERPRINT, Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.weights import find_weights

if TYPE_CHECKING:
    import torch

    from opensora.data.buckets import Bucket
    from opensora.data.loader import Samples
    from opensora.models.stdit import STDiT
    from opensora.training.step_encoder import StepEncoder

JOB = "job.json"
RESULT = "result.json"
log = logging.getLogger(__name__)
STOPPED = "stopped.json"  # the signal that stopped the processes, after their checkpoint


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

    Args:
        stage: `train_image`, `train_video` or `train_highres`.
        source: for the stage's `data`; clips need all of it.
        previous: folder of the stage before, whose averaged weights this one starts from; None for the first.
        output: final folder of the step.
        root: folder of all results, where the tracking store lies by default.

    Raises:
        ConfigError: the GPU cannot hold it; nothing was loaded.
        StepError: a process failed.
        Stopped: a signal arrived; the next start goes on from the checkpoint.
    """
    from opensora.plan import check_fits

    train: TrainConfig = getattr(config, stage)
    before = read_report(previous).metrics if previous else {}
    read_report(source.manifest)
    data = json.loads((source.manifest / FINGERPRINT).read_text())
    settings = train.model_dump(exclude={"loader_workers"})  # which change no sample
    folder = StepFolder(output, fingerprint(stage, settings, config.model.model_dump(), before, data))
    if folder.is_done():
        return read_report(output)
    check_fits(config, stage)
    work = folder.open()
    (work / STOPPED).unlink(missing_ok=True)
    job = {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "source": source.resolved(),
        "previous": str(previous.resolve()) if previous else "",
        "root": str(root.resolve()),
    }
    write_json(work / JOB, job)
    if train.processes == 1:
        train_in_process(work)
    else:
        _launch(work, train.processes)
    result = json.loads((work / RESULT).read_text())
    (work / JOB).unlink()
    (work / RESULT).unlink()
    kept, excluded = result["clips"], result["excluded"]
    total = kept + sum(excluded.values())
    return folder.finish(Report(stage, total=total, kept=kept, dropped=excluded, metrics=result["metrics"]))


def _launch(work: Path, processes: int) -> None:
    """Run the stage in several processes, by the launcher behind torchrun, and wait.

    Raises:
        StepError: a process failed.
        Stopped: a signal arrived, and a checkpoint was written.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from opensora.training.train import Stopped

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a process says itself why it fails
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        ),
        sys.executable,
    )
    try:
        launch("-m", "opensora.training.stages", str(work))
    except (ChildFailedError, SignalException) as error:
        if (work / STOPPED).is_file():
            raise Stopped(json.loads((work / STOPPED).read_text())) from error
        raise StepError("a training process failed; the lines above say why, and a new start resumes") from error


def train_in_process(work: Path) -> None:
    """One process of a stage, described by the job file in `work`; rank 0 leaves the result there."""
    from opensora.data.buckets import Bucket, Plan
    from opensora.parallel.engine import build_engine
    from opensora.plan import check_fits
    from opensora.tracking import Tracker
    from opensora.training.train import Stopped, Trainer

    job = json.loads((work / JOB).read_text())
    config, stage = build_config(job["config"]), job["stage"]
    train: TrainConfig = getattr(config, stage)
    source = Source(**{name: Path(path) for name, path in job["source"].items()})
    engine = build_engine(train)
    check_fits(config, stage, engine.device)
    bucket = Bucket(train.frames, train.height, train.width, train.batch_size, train.frame_interval)
    data, encoder, latent_height = open_data(config, train, source, bucket, engine.device)
    plan = Plan(data.clips, [bucket], train.seed, engine.world_size)
    model = build_model(config, stage, latent_height, Path(job["previous"]) if job["previous"] else None)
    info = {"config": job["config"], "stage": stage, **model_places(config, train, latent_height)}
    tracker = None
    if engine.rank == 0:
        log.info("%s: %d of %d clips; not used: %s", stage, len(plan), plan.total, dict(plan.excluded) or "none")
        params = {"train": train.model_dump(), "model": config.model.model_dump()}
        tracker = Tracker.start(Path(job["root"]), config.profile, stage, params, {}, work)
    try:
        trainer = Trainer(train, model, data, plan, engine, tracker, work, info, encoder, config.hardware)
        if tracker:
            with tracker:
                metrics = trainer.run()
        else:
            metrics = trainer.run()
        if engine.rank == 0:
            write_json(work / RESULT, {"metrics": metrics, "clips": len(plan), "excluded": dict(plan.excluded)})
    except Stopped as stopped:
        if engine.rank == 0:
            write_json(work / STOPPED, stopped.number)
        raise
    finally:
        engine.close()


def open_data(
    config: Config, train: TrainConfig, source: Source, bucket: "Bucket", device: "torch.device"
) -> "tuple[Samples, StepEncoder | None, int]":
    """The stage's data set, what encodes its frames if it holds frames, and the height of its latents.

    Raises:
        StepError: there are no clips, or none of that size.
    """
    match train.data:
        case "latents":
            from opensora.data.dataset import LatentDataset

            latents = LatentDataset(source.manifest, [bucket], config.encode.max_tokens)
            return latents, None, latents.latent_size[0]
        case "clips":
            from opensora.data.clip_dataset import ClipDataset
            from opensora.training.step_encoder import StepEncoder

            assert source.shards
            assert source.vae
            assert source.text
            encoder = StepEncoder(config.encode, source.vae, source.text, device)
            return ClipDataset(source.manifest, source.shards, [bucket]), encoder, train.height // encoder.vae.scale


def model_places(config: Config, train: TrainConfig, latent_height: int) -> dict[str, object]:
    """Where generation finds the VAE and the text encoder: relative to a folder above the checkpoint."""
    if config.demo.build_models:
        folder = "demo_models"
    else:
        folder = str(Path(config.weights_dir).resolve())
    return {
        "vae": f"{folder}/{config.encode.vae}",
        "text_encoder": f"{folder}/{config.encode.text_encoder}",
        "vae_scale": train.height // latent_height,
    }


def build_model(config: Config, stage: str, latent_height: int, previous: Path | None) -> "STDiT":
    """The stage's STDiT with the weights it starts from: the stage before, `init_from`, or new ones."""
    import torch

    from opensora.models.checkpoints import load_released, read_released
    from opensora.models.stdit import STDiT
    from opensora.training.checkpoint import load_weights, newest_checkpoint, stdit_config

    train: TrainConfig = getattr(config, stage)
    torch.manual_seed(train.seed)
    model = STDiT(stdit_config(config, stage, train.height // latent_height))
    if train.init_from:
        path = find_weights(train.init_from, Path(config.weights_dir), config.offline)
        report = load_released(model, read_released(path))
        log.info("%s: %d tensors from %s, %d new", stage, len(report.loaded), path, len(report.initial))
    elif previous:
        load_weights(model, newest_checkpoint(previous / "checkpoints"), "ema")
    return model


def stage_before(stage: str) -> str | None:
    """The stage whose weights `stage` starts from."""
    index = TRAIN_STEPS.index(stage)
    return TRAIN_STEPS[index - 1] if index else None


def _main() -> int:
    end_with_parent()
    from opensora.training.train import Stopped

    try:
        train_in_process(Path(sys.argv[1]))
    except Stopped as stopped:
        return stopped.exit_code  # the launcher says it once
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
