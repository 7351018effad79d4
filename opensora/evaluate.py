"""The step `evaluate`: fixed prompts through every stage, measured and shown."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from opensora.clip_file import contact_sheet, write_clip
from opensora.config import Config, EvaluateConfig
from opensora.data.workers import run_tasks
from opensora.demo.shapes import COLOURS, all_scenes, detect, held_out_scenes, parse_caption, render_clip
from opensora.gallery import write_gallery
from opensora.metrics.features import EXTRACTOR, randconv_features
from opensora.metrics.frechet import frechet_distance
from opensora.metrics.motion import dynamic_degree, flicker, motion_smoothness
from opensora.progress import track
from opensora.step import Report, StepError, StepFolder, fingerprint, read_report, write_json
from opensora.tracking.tracker import Tracker
from opensora.training.checkpoint import newest_checkpoint, read_info

TIMEOUT_S = 24 * 3600.0
REFERENCE_SEED = 7


@dataclass(frozen=True)
class Task:
    """Some prompts for one stage; results go to `folder`."""

    stage: str
    checkpoint: Path
    prompts: list[str]
    first: int  # number of the first prompt
    folder: Path
    config: EvaluateConfig

    @property
    def texts(self) -> Path:
        """Where the embedded prompts lie."""
        return self.folder / "parts" / "text"

    @property
    def result(self) -> Path:
        """Written last: the task is done when it is there."""
        return self.folder / "parts" / f"{self.stage}-{self.first:04d}.json"


def run(
    config: Config,
    stages: Mapping[str, Path],
    output: Path,
    root: Path,
    *,
    extra: Mapping[str, float],
    seconds: Mapping[str, float],
    peak_memory_mib: float,
) -> Report:
    """Evaluate the newest checkpoint of every stage; leaves metrics.json, gallery.html and samples/.

    Args:
        stages: folders of the training steps, in order.
        extra: metrics measured elsewhere.
        seconds: wall time of the steps before.

    Raises:
        StepError: a stage has no checkpoint, or generation failed.
    """
    checkpoints = {name: newest_checkpoint(folder / "checkpoints") for name, folder in stages.items()}
    hashes = {name: read_info(path)["sha256"] for name, path in checkpoints.items()}
    prompts = evaluation_prompts(config.evaluate)
    folder = StepFolder(output, fingerprint(config.evaluate.model_dump(), prompts, hashes, dict(extra)))
    if folder.is_done():
        return read_report(output)
    work = folder.open()
    (work / "parts").mkdir(exist_ok=True)
    with Tracker.start(
        root, config.profile, "evaluate", {"evaluate": config.evaluate.model_dump()}, {}, work
    ) as tracker:
        results = _generate(config.evaluate, checkpoints, prompts, work)
        metrics: dict[str, object] = dict(extra)
        for stage in stages:
            metrics |= {f"{stage}_{name}": value for name, value in measure(prompts, results[stage]).items()}
        metrics |= _headline(metrics, list(stages))
        metrics |= {"fd_extractor": EXTRACTOR, "samples_per_stage": len(prompts)}
        metrics |= {"seconds": dict(seconds), "peak_memory_mib": peak_memory_mib}
        write_json(work / "metrics.json", metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        curves = {name: _losses(path) for name, path in stages.items()}
        write_gallery(work / "gallery.html", prompts, results, numbers, curves, work)
        _sheet(work, prompts, results)
        _track(tracker, work, prompts, results, numbers)
        shutil.rmtree(work / "parts")
    count = len(prompts) * len(stages)
    return folder.finish(Report("evaluate", total=count, kept=count, metrics=numbers))


def evaluation_prompts(config: EvaluateConfig) -> list[str]:
    """The prompts of the configuration and of its file, or all of the embedded world; raises ConfigError."""
    from opensora.generate import read_prompts

    prompts = list(config.prompts)
    if config.prompts_file:
        prompts += [text for text, _ in read_prompts(Path(config.prompts_file), 0)]
    return prompts or [scene.caption for scene in all_scenes()]


def _generate(
    config: EvaluateConfig, checkpoints: Mapping[str, Path], prompts: list[str], work: Path
) -> dict[str, list[dict]]:
    """Results by stage, in the prompts' order; a stopped run goes on with the parts that are missing."""
    from opensora.generate import Pipeline

    size = config.batch_size
    tasks = [
        Task(stage, path, prompts[start : start + size], start, work, config)
        for stage, path in checkpoints.items()
        for start in range(0, len(prompts), size)
    ]
    left = [task for task in tasks if not task.result.is_file()]
    for task in {task.checkpoint: task for task in left}.values():
        # Once and here: the text encoder can be larger than all else, and each worker would load it.
        Pipeline.load(task.checkpoint, task.texts).embed(prompts)
    outcomes = run_tasks(evaluate_part, left, config.processes, TIMEOUT_S)
    for outcome in track(outcomes, len(left), "generating (batches)"):
        if outcome.failure:
            raise StepError(f"generation with {left[outcome.index].stage} failed: {outcome.failure}")
    results: dict[str, list[dict]] = {stage: [] for stage in checkpoints}
    for task in tasks:
        results[task.stage] += json.loads(task.result.read_text())
    return results


_PIPELINES: dict[Path, object] = {}  # a worker process loads each checkpoint once


def evaluate_part(task: Task) -> int:
    """Generate the task's prompts, write the samples, and leave their measures in `task.result`."""
    import torch

    from opensora.generate import Pipeline, choose_sampling

    torch.set_num_threads(1)
    if task.checkpoint not in _PIPELINES:
        _PIPELINES[task.checkpoint] = Pipeline.load(task.checkpoint, task.texts)
    pipeline = _PIPELINES[task.checkpoint]
    assert isinstance(pipeline, Pipeline)
    seeds = [task.config.seed + task.first + place for place in range(len(task.prompts))]
    how = task.config
    sampler = how.sampler or pipeline.checkpoint.train.objective
    sampling = choose_sampling(pipeline.checkpoint, sampler, how.steps, how.guidance, how.guidance_mode)
    videos = pipeline.sample(pipeline.embed(task.prompts), seeds, sampling)
    samples = task.folder / "samples" / task.stage
    samples.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, frames in enumerate(videos):
        path = write_clip(samples / f"{task.first + place:03d}", frames, task.config.fps, note=task.prompts[place])
        rows.append(describe_sample(task.prompts[place], frames) | {"file": str(path.relative_to(task.folder))})
    write_json(task.result, rows)
    return len(rows)


def describe_sample(prompt: str, frames: np.ndarray) -> dict:
    """What one generated clip uint8 [T, H, W, 3] shows, and its measures."""
    scene = parse_caption(prompt)
    reference = None
    if scene is not None:
        rng = np.random.default_rng([REFERENCE_SEED, all_scenes().index(scene)])
        clip = render_clip(scene, frames.shape[0], frames.shape[1], rng)
        reference = randconv_features(clip[None])[0].tolist()
    return {
        "frames": len(frames),
        "seen": asdict(detect(frames)) if scene else None,
        "flicker": flicker(frames),
        "dynamic_degree": dynamic_degree(frames),
        "motion_smoothness": motion_smoothness(frames),
        "features": randconv_features(frames[None])[0].tolist(),
        "reference": reference,
    }


def follows(prompt: str, row: dict) -> dict[str, bool] | None:
    """Which parts of a prompt of the embedded world a sample shows; None for other prompts.

    A picture has no direction: for one frame, colour and shape are the whole prompt.
    """
    scene = parse_caption(prompt)
    if scene is None:
        return None
    parts = ("colour", "shape") + (("direction",) if row["frames"] > 1 else ())
    right = {part: row["seen"][part] == getattr(scene, part) for part in parts}
    return right | {"prompt": all(right.values())}


def measure(prompts: Sequence[str], rows: Sequence[dict]) -> dict[str, float]:
    """Metrics of one stage; those that cannot be measured are absent."""
    metrics = {name: float(np.mean([row[name] for row in rows])) for name in ("flicker", "dynamic_degree")}
    metrics["motion_smoothness"] = float(np.mean([row["motion_smoothness"] for row in rows]))
    verdicts = [(prompt, follows(prompt, row)) for prompt, row in zip(prompts, rows, strict=True)]
    known = [(prompt, verdict) for prompt, verdict in verdicts if verdict is not None]
    held_out = {scene.caption for scene in held_out_scenes()}
    for name, wanted in {"": (False, True), "_seen": (False,), "_held_out": (True,)}.items():
        chosen = [verdict["prompt"] for prompt, verdict in known if (prompt in held_out) in wanted]
        if chosen:
            metrics[f"prompt_following{name}"] = float(np.mean(chosen))
    for part in ("colour", "shape", "direction"):
        values = [verdict[part] for _, verdict in known if part in verdict]
        if values:
            metrics[part] = float(np.mean(values))
    if len(known) == len(rows) and len(rows) > 1:
        made, real = (np.array([row[name] for row in rows]) for name in ("features", "reference"))
        metrics[f"fd_{EXTRACTOR}"] = frechet_distance(made, real)
    return metrics


def _headline(metrics: Mapping[str, object], stages: list[str]) -> dict[str, object]:
    """The last stage's prompt-following, and the image stage's share of right colours and shapes, over all prompts."""
    names = {f"prompt_following_{part}": f"{stages[-1]}_prompt_following_{part}" for part in ("seen", "held_out")}
    names["image_stage_accuracy"] = f"{stages[0]}_prompt_following"
    return {name: metrics[source] for name, source in names.items() if source in metrics}


def _losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "losses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]


def _sheet(work: Path, prompts: list[str], results: Mapping[str, list[dict]]) -> None:
    """A picture of some clips of the last stage; of the embedded world four held-out ones that differ in all parts."""
    from opensora.data.video import read_frames

    rows = list(results.values())[-1]
    if rows[0]["frames"] < 2:
        return
    varied = [scene.caption for scene in held_out_scenes()[: len(COLOURS)]]
    chosen = [prompts.index(text) for text in varied if text in prompts] or list(range(min(4, len(prompts))))
    clips = [(prompts[index], read_frames((work / rows[index]["file"]).read_bytes())) for index in chosen]
    contact_sheet(work / "frames.png", clips)


def _track(
    tracker: Tracker, work: Path, prompts: list[str], results: Mapping[str, list[dict]], metrics: dict[str, float]
) -> None:
    tracker.log_metrics(metrics)
    for number, (stage, rows) in enumerate(results.items()):
        for row in rows[:4]:
            tracker.log_artifact(work / row["file"], f"samples/{stage}")
        if rows[0]["frames"] == 1:
            from PIL import Image

            tracker.log_image(np.asarray(Image.open(work / rows[0]["file"])), f"{stage}/{prompts[0]}", number)
    for name in ("metrics.json", "gallery.html", "frames.png"):
        if (work / name).is_file():
            tracker.log_artifact(work / name)
