"""What the gate judges: files of the evaluation, hashes of checkpoints, tags of the registry's versions."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import av

from opensora.config import UserError
from opensora.data.video import read_frames
from opensora.evaluation.files import BESIDE, METRICS, SCORES, hash_evaluation
from opensora.evaluation.hashes import hash_models, models_tag
from opensora.promotion.gate import SIGNATURE, Candidate, Champion, Evaluation
from opensora.step import CACHE, StepError
from opensora.tracking.registry import (
    CHAMPION,
    CHECKPOINT_SHA256,
    CHECKPOINT_URI,
    EVALUATION_FILES,
    EVALUATION_URI,
    ROLLED_BACK,
    Version,
    champion,
    lost_champion,
)
from opensora.tracking.version_files import FilesGone, checkpoint_folder, find_here, make_whole
from opensora.training.checkpoint import SAMPLED, CheckpointError, find_newest, read_info


def find_candidate(train: Path) -> tuple[Path, dict]:
    """The newest checkpoint of a training step and its description, its files not read yet.

    A damaged one is not passed over for the one before it: the evaluation is of the newest.

    Raises:
        CheckpointError: there is none, or of another version.
    """
    checkpoint = find_newest(train / "checkpoints", verify=False)
    if checkpoint is None:
        raise CheckpointError(f"no usable checkpoint in {train / 'checkpoints'}; run `opensora {train.name}` first")
    return checkpoint, read_info(checkpoint, verify=False)


def read_candidate(checkpoint: Path, info: dict, evaluate: Path, profile: str) -> Candidate:
    """Everything that the gate judges of a candidate and that the registry does not know.

    Its lineage is the training's, which checkpoint.json holds: what is here now may be another commit, other data.

    Args:
        evaluate: folder of the finished step.

    Raises:
        StepError: there is no evaluation, or it cannot be read.
    """
    from opensora.served_model import signature_of  # which imports MLflow

    evaluation = read_evaluation(evaluate, info["stage"])
    measured = {name: str(evaluation.metrics.get(name)) for name in ("fd_extractor", "samples_per_stage")}
    known = {CHECKPOINT_SHA256: info["sha256"], "stage": info["stage"], "profile": profile, SIGNATURE: signature_of()}
    problem, models = damage(checkpoint, info["sha256"]), {}
    try:
        models = hash_models(info, checkpoint, evaluate.parent / CACHE)
    except (UserError, OSError) as error:
        problem = problem or str(error)
    return Candidate(
        sha256=info["sha256"],
        tags=info.get("lineage", {}) | measured | known | {models_tag(name): value for name, value in models.items()},
        evaluation=evaluation,
        artifact_problem=problem,
        models_sha256=models,
        sample_problem=_look_at_a_clip(evaluate / "samples" / info["stage"]),
        evaluated_sha256=str(evaluation.metrics.get("checkpoint_sha256", "")),
    )


def read_evaluation(folder: Path, stage: str) -> Evaluation:
    """What `evaluate`, or the copy that a version keeps of it, says of one stage; raises StepError."""
    metrics = _read_json(folder / METRICS)
    if not metrics:
        raise StepError(f"no {folder / METRICS}; run `opensora evaluate` first")
    scores = _read_json(folder / SCORES)
    return Evaluation(
        metrics,
        prompts=scores.get("prompts"),
        seeds=scores.get("seeds"),
        scores=scores.get("stages", {}).get(stage),
    )


def _read_json(path: Path) -> dict:
    """Empty where there is no such file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StepError(f"{path} is damaged ({error}); run `opensora evaluate` again") from None
    if not isinstance(value, dict):
        raise StepError(f"{path} holds a {type(value).__name__}, expected a mapping; run `opensora evaluate` again")
    return value


def damage(folder: Path, sha256: str) -> str:
    """Why a checkpoint's folder does not hold what sampling reads of `sha256`; empty if it does. Reads those files."""
    try:
        found = read_info(folder, only=SAMPLED)["sha256"]
    except (UserError, OSError, KeyError) as error:
        return str(error)
    return "" if found == sha256 else f"{folder} holds another checkpoint, sha256 {found[:12]}"


def served_damage(folder: Path, sha256: str) -> str:
    """Why a served model is not the whole one of a checkpoint; empty if it is. Reads VAE and text encoder, too."""
    from opensora.served_model import verify_served_model

    try:
        found = verify_served_model(folder).sha256
    except (UserError, OSError, KeyError) as error:
        return str(error)
    return "" if found == sha256 else f"{folder} holds another checkpoint, sha256 {found[:12]}"


def damage_of(root: Path, model: str, version: Version, fetch: bool = True) -> str:
    """Why a registered version cannot be loaded; empty if its files are those that were registered. Reads them all.

    Args:
        fetch: where they are not on this machine, or damaged, but in a server's store, fetch them.

    Raises:
        RegistryError: the server does not answer, or the disk is full.
    """
    sha256 = version.tags.get(CHECKPOINT_SHA256)
    if CHECKPOINT_URI not in version.tags or not sha256:
        return f"it was registered without {CHECKPOINT_URI} and {CHECKPOINT_SHA256}, not by `opensora promote`"
    try:
        folder = checkpoint_folder(root, model, version)
    except FilesGone as error:
        return str(error)
    problem = served_damage(_served(folder), sha256)
    if problem and fetch:
        with suppress(FilesGone):  # then the damage that is here says more
            if make_whole(root, model, version):
                problem = served_damage(_served(folder), sha256)
    return problem


def _served(checkpoint: Path) -> Path:
    """The served model in which a version's checkpoint lies; see `checkpoint_of`, which goes the other way."""
    return checkpoint.parent.parent


def _with_signature(root: Path, model: str, version: Version) -> Mapping[str, str]:
    """Its tags; the signature from the files themselves where nobody wrote it down, or somebody took it away."""
    from opensora.served_model import signature_of

    here = find_here(root, model, version)
    if SIGNATURE in version.tags or here is None:
        return version.tags
    try:
        return {**version.tags, SIGNATURE: signature_of(_served(here))}
    except UserError:
        return version.tags


def _look_at_a_clip(folder: Path) -> str:
    """Why no mp4 there decodes; empty if one does."""
    problem = f"no mp4 of the candidate in {folder}; run `opensora evaluate` again"
    for path in sorted(folder.glob("*.mp4")):
        try:
            if len(read_frames(path.read_bytes())):
                return ""
        except (av.FFmpegError, ValueError, OSError) as error:
            problem = f"{path} does not decode: {error}"
    return problem


def why_rolled_back(version: Version) -> str:
    """Who took a version back, when and why; empty if nobody did, or it is the champion."""
    event = version.tags.get(ROLLED_BACK)
    if not event or CHAMPION in version.aliases:
        return ""
    said = json.loads(event)
    why = f": {said['reason']}" if said["reason"] else ""
    back = f"`opensora rollback --to {version.version}` makes it the champion again"
    return f"{said['by']} took version {version.version}, this checkpoint, back on {said['at']}{why}; {back}"


def read_champion(root: Path, model: str, evaluate: Path, candidate: Evaluation, stage: str) -> Champion | None:
    """The champion as the gate judges it; None where the registry never had one.

    Its evaluation is the one that `evaluate` made of it beside the candidate's, on the same prompts and seeds, if that
    is of this very version; else the one that was recorded when it was promoted.
    """
    version = champion(root, model)
    if version is None:
        gone = lost_champion(root, model)
        why = "the alias `champion` is gone: its version was deleted from the registry, or somebody removed it"
        return Champion(gone, "", lost=why, has_alias=False) if gone else None
    sha256, lost = version.tags.get(CHECKPOINT_SHA256, ""), damage_of(root, model, version)
    beside = _read_json(evaluate / BESIDE)
    if (str(beside.get("version")), beside.get("sha256")) == (version.version, sha256):
        # On the candidate's prompts and seeds; what else has to be equal, it says itself.
        evaluation: Evaluation | None = Evaluation(
            beside.get("metrics") or {}, candidate.prompts, candidate.seeds, beside.get("scores")
        )
        source = "evaluated beside the candidate"
    else:
        evaluation, source = _recorded(version, stage), "as evaluated when it was promoted"
    lost = lost or _why_not_evaluated(candidate.metrics, version.version, sha256)
    return Champion(
        version.version, sha256, _with_signature(root, model, version), None if lost else evaluation, source, lost
    )


def _why_not_evaluated(metrics: Mapping[str, object], version: str, sha256: str) -> str:
    """Why `evaluate` could not run this champion beside the candidate; empty if it could, or never tried."""
    if (str(metrics.get("champion_version")), metrics.get("champion_sha256")) != (version, sha256):
        return ""
    reason = metrics.get("champion_unavailable")
    return f"{reason}; `opensora evaluate` tries it again" if reason else ""


def _recorded(version: Version, stage: str) -> Evaluation | None:
    """What a version keeps of its evaluation, if nobody changed it."""
    folder = Path(version.tags.get(EVALUATION_URI, ""))
    try:
        if hash_evaluation(folder) == version.tags.get(EVALUATION_FILES):
            return read_evaluation(folder, stage)
    except (OSError, StepError):
        pass
    return None
