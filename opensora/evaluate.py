"""The step `evaluate`: fixed prompts through every stage, measured, shown, and set beside the champion's."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opensora.clip_file import contact_sheet, read_note
from opensora.config import Config
from opensora.demo.shapes import COLOURS, held_out_scenes
from opensora.evaluation.champion import Champion, find_champion
from opensora.evaluation.files import METRICS, SCORES
from opensora.evaluation.hashes import hash_models
from opensora.evaluation.measuring import Findings, measure_all
from opensora.evaluation.plan import Data, Plan, make_plan
from opensora.evaluation.plots import write_plots
from opensora.evaluation.records import champion_record, metrics_record, scores_record
from opensora.evaluation.sampling import Weights
from opensora.evaluation.scores import Measured
from opensora.gallery import write_gallery
from opensora.step import CACHE, Report, StepFolder, fingerprint, read_report, write_json
from opensora.tracking.registry import model_name
from opensora.tracking.tracker import Tracker
from opensora.training.checkpoint import describe_checkpoint


def run(
    config: Config,
    stages: Mapping[str, Path],
    output: Path,
    root: Path,
    *,
    data: Data | None = None,
    weights: Weights | None = None,
    extra: Mapping[str, float],
    seconds: Mapping[str, float],
    peak_memory_mib: float,
) -> Report:
    """Evaluate the newest checkpoint of every stage, and the last one beside the registry's champion.

    Leaves metrics.json, scores.json (of every prompt), champion.json where there is a champion, gallery.html, plots/
    and samples/.

    Args:
        stages: folders of the training steps, in order.
        data: real clips; None renders those of the embedded world.
        weights: of metrics' extractors, by name; None where there are none.
        extra: metrics measured elsewhere.
        seconds: wall time of the steps before.

    Raises:
        StepError: a stage has no checkpoint, or generation failed.
    """
    checkpoints = {name: describe_checkpoint(folder / "checkpoints") for name, folder in stages.items()}
    plan = make_plan(config.evaluate, data, weights or {}, output.parent / CACHE)
    references = {name: plan.reference(checkpoint) for name, checkpoint in checkpoints.items()}
    models = {name: hash_models(one.info, one.folder, plan.cache) for name, one in checkpoints.items()}
    champion = find_champion(root, model_name(config.profile), plan.cache)
    opponent = _opponent(champion)
    made_of = (
        config.evaluate.model_dump(exclude={"processes"}),
        [plan.identity(reference) for reference in references.values()],
        {name: checkpoint.sha256 for name, checkpoint in checkpoints.items()},
        models,
        dict(extra),
    )
    folder = StepFolder(output, fingerprint(*made_of, opponent))
    last, candidate = list(checkpoints.items())[-1]
    if before := _read_whole(output, last):
        if champion and champion.sha256 == candidate.sha256:
            # A candidate that became champion keeps the evaluation that it was judged by.
            judged_by = StepFolder(output, fingerprint(*made_of, before["compared_with"]))
            if judged_by.is_done() or folder.is_done():
                return read_report(output)
        elif folder.is_done() and not _is_back(champion, before):
            return read_report(output)
    work = folder.open()
    (work / "parts").mkdir(exist_ok=True)
    settings = {"evaluate": config.evaluate.model_dump()}
    with Tracker.start(root, config.profile, "evaluate", settings, {}, work) as tracker:
        if plan.data:
            tracker.log_dataset(plan.data.manifest, "evaluation")
        found = measure_all(plan, checkpoints, references, champion, work)
        metrics = dict(extra) | metrics_record(plan, found) | {"compared_with": opponent}
        metrics |= {"checkpoint_sha256": checkpoints[found.last].sha256, "models_sha256": models[found.last]}
        metrics |= {"seconds": dict(seconds), "peak_memory_mib": peak_memory_mib}
        _write(config.profile, plan, found, metrics, stages, work)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        _track(tracker, work, plan.prompts, found, numbers)
        shutil.rmtree(work / "parts")
    count = len(plan.prompts) * len(stages)
    return folder.finish(Report("evaluate", total=count, kept=count, metrics=numbers))


def _opponent(found: Champion | None) -> str:
    """What the step's fingerprint says of the champion; empty where there is none."""
    return " ".join([found.sha256, *found.models.values(), found.unavailable]).strip() if found else ""


def _read_whole(output: Path, stage: str) -> dict[str, Any] | None:
    """metrics.json of an evaluation of which all that others read can be read; None if something is lost or damaged.

    Args:
        stage: the last one, whose clips the gate looks at and a version keeps.
    """
    try:
        metrics, scores = (json.loads((output / name).read_text()) for name in (METRICS, SCORES))
        for number in range(len(scores["prompts"])):
            (clip,) = (output / "samples" / stage).glob(f"{number:03d}.*")
            read_note(clip)
        return metrics if "compared_with" in metrics else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_back(found: Champion | None, before: Mapping[str, Any]) -> bool:
    """Whether the champion lacks in a finished evaluation, where it could not generate, and can be loaded now.

    What it lacked, memory or its VAE, may be there now. The candidate's clips are kept, and are not made again.
    """
    return found is not None and found.checkpoint is not None and "champion_unavailable" in before


def _write(
    profile: str, plan: Plan, found: Findings, metrics: dict[str, Any], stages: Mapping[str, Path], work: Path
) -> None:
    """All files but the samples: for the gate, for DVC, and for those who look."""
    write_json(work / METRICS, metrics)
    write_json(work / SCORES, scores_record(plan, found))
    if champion := champion_record(metrics, found):
        write_json(work / "champion.json", champion)
    curves = {name: _losses(path) for name, path in stages.items()}
    write_plots(work / "plots", plan.prompts, found.stages, curves)
    write_gallery(work, model_name(profile), plan.prompts, plan.seeds, found, metrics, curves)
    _sheet(work, plan.prompts, found.candidate)


def _losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "losses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]


def _sheet(work: Path, prompts: Sequence[str], found: Measured) -> None:
    """A picture of some clips of the last stage; of the embedded world four held-out ones that differ in all parts."""
    from opensora.data.video import read_frames

    if not found.files[0].endswith(".mp4"):
        return
    varied = [scene.caption for scene in held_out_scenes()[: len(COLOURS)]]
    chosen = [prompts.index(text) for text in varied if text in prompts] or list(range(min(4, len(prompts))))
    clips = [(prompts[index], read_frames((work / found.files[index]).read_bytes())) for index in chosen]
    contact_sheet(work / "frames.png", clips)


def _track(tracker: Tracker, work: Path, prompts: Sequence[str], found: Findings, metrics: dict[str, float]) -> None:
    tracker.log_metrics(metrics)
    for number, (stage, measured) in enumerate(found.stages.items()):
        for file in measured.files[:4]:
            tracker.log_artifact(work / file, f"samples/{stage}")
        if measured.files[0].endswith(".png"):
            from PIL import Image

            tracker.log_image(np.asarray(Image.open(work / measured.files[0])), f"{stage}/{prompts[0]}", number)
    for name in ("metrics.json", "scores.json", "champion.json", "gallery.html", "frames.png"):
        if (work / name).is_file():
            tracker.log_artifact(work / name)
