"""One process of a stage: what it is given by the job file, it turns into a trainer; rank 0 leaves the result."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.config import Config, TrainConfig, UserError, build_config
from opensora.process import end_with_parent
from opensora.step import UNWRITABLE, write_json
from opensora.training.stages import JOB, RESULT, STOPPED, Source
from opensora.training.stop import Stopped, listen
from opensora.weights import find_weights

if TYPE_CHECKING:
    import torch

    from opensora.data.buckets import Bucket
    from opensora.data.loader import Samples
    from opensora.models.stdit import STDiT
    from opensora.parallel.engine import Engine
    from opensora.training.step_encoder import StepEncoder

log = logging.getLogger(__name__)


def train_in_process(work: Path, engine: "Engine | None" = None) -> None:
    """Train as the job file in `work` says.

    Args:
        engine: of the run that this process has joined; by default one is made, and closed at the end.

    Raises:
        Stopped: a signal arrived, and a checkpoint was written.
        UserError: as `Trainer.run`, and what loading data and models raises.
    """
    from opensora.parallel.engine import build_engine

    job = json.loads((work / JOB).read_text())
    config, stage = build_config(job["config"]), job["stage"]
    if engine is not None:
        _train(config, stage, job, work, engine)
        return
    engine = build_engine(getattr(config, stage))
    try:
        _train(config, stage, job, work, engine)
    finally:
        engine.close()


def _train(config: Config, stage: str, job: dict, work: Path, engine: "Engine") -> None:
    from contextlib import nullcontext

    from opensora.data.buckets import Plan, stage_buckets
    from opensora.plan import check_fits
    from opensora.tracking.tracker import Tracker
    from opensora.training.samples import SampleWriter
    from opensora.training.train import Trainer

    train: TrainConfig = getattr(config, stage)
    check_fits(config, stage, engine.device)
    source = Source(**{name: Path(path) for name, path in job["source"].items()})
    buckets = stage_buckets(train)
    data, encoder, latent_height = open_data(config, train, source, buckets, engine.device)
    plan = Plan(data.clips, buckets, train.seed, engine.data_world_size, train.accumulate, train.image_share)
    model = build_model(config, stage, latent_height, Path(job["previous"]) if job["previous"] else None)
    places = model_places(config, train, latent_height)
    tracker = None
    if engine.rank == 0:
        log.info("%s: %d of %d clips; not used: %s", stage, len(plan), plan.total, dict(plan.excluded) or "none")
        sections = {"train": train, "model": config.model, "encode": config.encode, "hardware": config.hardware}
        params = {name: section.model_dump() for name, section in sections.items()}
        tracker = Tracker.start(Path(job["root"]), config.profile, stage, params, {}, work)
        tracker.log_dataset(source.manifest, "training")
    with tracker or nullcontext():
        samples = SampleWriter(config, stage, places, work, engine.device, tracker) if train.sample_every else None
        trainer = Trainer(
            config=train,
            model=model,
            data=data,
            plan=plan,
            engine=engine,
            folder=work,
            info={"config": job["config"], "stage": stage, "lineage": job["lineage"], **places},
            hardware=config.hardware,
            tracker=tracker,
            encoder=encoder,
            samples=samples,
        )
        try:
            metrics = trainer.run()
        except Stopped as stopped:
            if engine.rank == 0:
                write_json(work / STOPPED, stopped.number)
            raise
    if engine.rank == 0:
        write_json(work / RESULT, {"metrics": metrics, "clips": len(plan), "excluded": dict(plan.excluded)})


def open_data(
    config: Config, train: TrainConfig, source: Source, buckets: "list[Bucket]", device: "torch.device"
) -> "tuple[Samples, StepEncoder | None, int]":
    """The stage's data set, what encodes its frames if it holds frames, and the height of its latents.

    Raises:
        StepError: there are no clips, or none of that size.
    """
    match train.data:
        case "latents":
            from opensora.data.dataset import LatentDataset

            latents = LatentDataset(source.manifest, buckets, config.encode.max_tokens)
            return latents, None, latents.latent_size[0]
        case "clips":
            from opensora.data.clip_dataset import ClipDataset
            from opensora.training.step_encoder import StepEncoder

            assert source.shards
            assert source.vae
            assert source.text
            encoder = StepEncoder(config.encode, source.vae, source.text, device)
            return ClipDataset(source.manifest, source.shards, buckets), encoder, train.height // encoder.vae.scale


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


def main() -> int:
    """Entry point of a process that `stages.run` launches."""
    listen()
    end_with_parent()
    try:
        train_in_process(Path(sys.argv[1]))
    except Stopped as stopped:
        return stopped.exit_code  # the launcher says it once
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {UNWRITABLE[error.errno]} and start again to resume", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
