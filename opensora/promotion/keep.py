"""The copy of what a registered version needs, out of the chain's folders, which the next run replaces.

registry/<model>/<first letters of the checkpoint's sha256>/
    model/                  the checkpoint and its models as MLflow serves them (`served_model`)
    evaluation/             metrics.json, scores.json, samples/<last stage>/
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora.evaluation.files import METRICS, SCORES, hash_evaluation
from opensora.promotion.evidence import served_damage
from opensora.step import UNWRITABLE, StepError
from opensora.tracking.version_files import MODEL
from opensora.training.checkpoint import read_info

EVALUATION = "evaluation"


def keep(place: Path, checkpoint: Path, evaluate: Path, judged: str) -> tuple[Path, Path]:
    """Copy a checkpoint, its models and its evaluation to `place`; a whole copy that is there already is left as it is.

    Models that the checkpoint names by an absolute path, as a text encoder of gigabytes, stay where they are; their
    hashes are kept.

    Args:
        judged: `hash_evaluation` of `evaluate`, taken before it was judged.

    Returns:
        Folders of the served model and of the copied evaluation.

    Raises:
        StepError, ServedModelError: they could not be written, as on a full disk, or not as they were read, or the
            evaluation is not the one that was judged; nothing half is left.
    """
    from opensora.served_model import save_served_model

    info, model = read_info(checkpoint, verify=False), place / MODEL
    try:
        if served_damage(model, info["sha256"]):  # not there yet, or not whole
            shutil.rmtree(model, ignore_errors=True)
            save_served_model(model, checkpoint, embed_models=False)
            if problem := served_damage(model, info["sha256"]):
                raise StepError(f"the copy of {checkpoint} is not what was read: {problem}; look at the disk")
        with _appearing(place / EVALUATION) as part:
            _copy_evaluation(evaluate, info["stage"], part)
            if hash_evaluation(part) != judged:
                raise StepError(f"{evaluate} was replaced while it was judged; nothing was registered, start again")
    except OSError as error:
        raise StepError(
            f"{checkpoint} could not be copied to {place}: {_reason(error)}; nothing was registered, and the same "
            "command again goes on"
        ) from error
    return model, place / EVALUATION


def _copy_evaluation(evaluate: Path, stage: str, part: Path) -> None:
    for name in (METRICS, SCORES):
        if (evaluate / name).is_file():
            _copy(evaluate / name, part / name)
    shutil.copytree(evaluate / "samples" / stage, part / "samples" / stage, copy_function=_copy)


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of whatever is there, or leaves no trace."""
    part, old = (place.with_name(f".{place.name}.{name}") for name in ("part", "old"))
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if place.exists():
            place.rename(old)
        part.rename(place)
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def _copy(source: str | Path, target: str | Path) -> None:
    """Content alone, on the disk when this returns: a version must outlive a power cut."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _reason(error: OSError) -> str:
    """Of one error, or of the first of the many that shutil collects in one."""
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        text = str(error.args[0][0][2])
        return next((advice for number, advice in UNWRITABLE.items() if f"[Errno {number}]" in text), text)
    return UNWRITABLE.get(error.errno or 0, str(error))
