"""The registry's champion beside the candidate: the same prompts and seeds, from its kept evaluation or made anew."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opensora.config import UserError
from opensora.data.reuse import link_file
from opensora.evaluation.files import METRICS, SCORES, hash_evaluation
from opensora.evaluation.hashes import hash_models, registered_models
from opensora.evaluation.reference import Reference
from opensora.evaluation.scores import Measured
from opensora.tracking.redact import redact
from opensora.tracking.registry import (
    CHECKPOINT_SHA256,
    EVALUATION_FILES,
    EVALUATION_URI,
    Version,
    champion,
)
from opensora.tracking.store import store_name, tracking_uri
from opensora.tracking.version_files import model_version_path
from opensora.training.checkpoint import Checkpoint, describe_checkpoint, locate

NAME = "champion"  # in the place of a stage's name
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Champion:
    """The version that users get now.

    Attributes:
        checkpoint: None if it cannot be loaded, or not with the VAE and the text encoder that it was registered with.
        models: hashes of its VAE and text encoder as they are now; see `hash_models`.
        kept: folder of its own evaluation, made when it was promoted; None if it is gone or somebody changed it.
        measured: None while it has still to generate.
        reference: real clips that its own are compared with; None while nobody asked.
        identity: of its evaluation; see `Plan.identity`.
        unavailable: why there is nothing to compare with.
    """

    version: str = ""
    sha256: str = ""
    checkpoint: Checkpoint | None = None
    models: dict[str, str] = field(default_factory=dict)
    kept: Path | None = None
    measured: Measured | None = None
    reference: Reference | None = None
    identity: str = ""
    unavailable: str = ""


def find_champion(root: Path, model: str, memory: Path) -> Champion | None:
    """The model's champion, or None if it has none yet. What is wrong with it is said in `unavailable`.

    Args:
        root: folder of all results.
        memory: folder that remembers hashes of large files; see `hash_folder`.
    """
    store = tracking_uri(root)
    if store.startswith(SQLITE) and not Path(store.removeprefix(SQLITE)).exists():
        return None  # asking would make the file, which takes seconds
    try:
        found = champion(root, model)
    except Exception as error:  # a server that is down must not cost an evaluation of hours
        reason = redact((str(error).splitlines() or [type(error).__name__])[0])
        return Champion(unavailable=f"the registry at {store_name(root)} cannot be asked: {reason}")
    if found is None:
        return None
    sha256 = found.tags.get(CHECKPOINT_SHA256, "")
    try:
        checkpoint = describe_checkpoint(model_version_path(f"models:/{model}/{found.version}", root))
        models = hash_models(checkpoint.info, checkpoint.folder, memory)
    except (UserError, OSError) as error:
        return Champion(found.version, sha256, unavailable=str(error))
    if changes := _changes(checkpoint, registered_models(found), models):
        return Champion(found.version, sha256, models=models, unavailable=changes)
    return Champion(found.version, sha256, checkpoint, models, _kept(found))


def _changes(checkpoint: Checkpoint, registered: Mapping[str, str], models: Mapping[str, str]) -> str:
    """Which of VAE and text encoder are others than the version was registered with; empty if none is."""
    return "; ".join(
        f"{locate(checkpoint.info[name], checkpoint.folder)} has sha256 {models[name][:12]}, and the version was "
        f"registered with {name} {before[:12]}; put those files back"
        for name, before in registered.items()
        if models[name] != before
    )


def _kept(version: Version) -> Path | None:
    """Where a version keeps its evaluation, if its numbers are those by which it was promoted."""
    folder = Path(version.tags.get(EVALUATION_URI, ""))
    if EVALUATION_URI not in version.tags or hash_evaluation(folder) != version.tags.get(EVALUATION_FILES):
        return None
    return folder


def read_kept(folder: Path, stage: str, height: int, identity: str, work: Path) -> Measured | None:
    """What an earlier evaluation found, if it was made as this one is; its clips are linked to `samples/champion/`.

    Args:
        folder: holds metrics.json, scores.json and samples/.
        stage: of the checkpoint; the names of its metrics begin with it.
        height: of the clips, pixels.
        identity: see `Plan.identity`.
        work: where this evaluation works.
    """
    samples = work / "samples" / NAME
    try:
        metrics = json.loads((folder / METRICS).read_text())
        scores = json.loads((folder / SCORES).read_text())["stages"][stage]
        if metrics["evaluation_sha256"] != identity:
            return None
        samples.mkdir(parents=True, exist_ok=True)
        files = []
        for number in range(len(scores)):
            (clip,) = (folder / "samples" / stage).glob(f"{number:03d}.*")
            link_file(clip, samples / clip.name)
            files.append(f"samples/{NAME}/{clip.name}")
        distances = metrics["distances"]
        own = {name.removeprefix(f"{stage}_"): value for name, value in metrics.items() if name.startswith(f"{stage}_")}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged, or of another version: made anew
    return Measured(files, scores, own, height, distances=distances)


def kept_measures(found: Champion, work: Path) -> Measured | None:
    """The champion's own evaluation, if it has one that was made as `found.identity` says."""
    if found.kept is None or found.checkpoint is None or found.reference is None:
        return None
    return read_kept(found.kept, found.checkpoint.stage, found.reference.shape.height, found.identity, work)
