"""VBench's dimensions of a checkpoint's clips, and the total score where all of them are measured."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opensora.data.reuse import link_file
from opensora.evaluation.plan import Plan
from opensora.evaluation.sampling import Row
from opensora.metrics.vbench import DIMENSIONS, final_scores, measure_videos, video_name
from opensora.metrics.vbench_runner import CUSTOM, NOT_SET, run_vbench
from opensora.step import fingerprint


def measure_by_vbench(
    plan: Plan, rows: Sequence[Row], clips: Path, videos: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics, and what is absent with its reason.

    VBench's own prompts are measured in all dimensions, and in those that take no weights also without the package;
    other prompts in the six dimensions that VBench offers for them.

    Args:
        rows: of the clips, in the prompts' order.
        clips: where they are kept; results of single dimensions are kept there, too, and not asked for again.
        videos: an empty folder to be filled with links to the clips.
    """
    if rows[0]["shape"][0] < 2:
        return {}, {"vbench": "the last stage makes pictures"}
    if not plan.benchmark and not plan.config.vbench:
        return {}, {"vbench": NOT_SET}
    names = _named(plan)
    videos.mkdir(parents=True, exist_ok=True)
    for name, row in zip(names, rows, strict=True):
        link_file(clips / row["file"], videos / name)
    metrics = measure_videos(plan.benchmark, videos)
    if not plan.config.vbench:
        return metrics, {"vbench": NOT_SET}
    output = clips / f"vbench-{fingerprint(plan.vbench, plan.pairs)[:16]}"
    if plan.benchmark:
        found = run_vbench(plan.config.vbench, videos, output, DIMENSIONS, full_info=Path(plan.config.prompts_file))
    else:
        prompts = dict(zip(names, plan.prompts, strict=True))
        found = run_vbench(plan.config.vbench, videos, output, CUSTOM, prompts=prompts)
    scores, absent = found.scores | final_scores(found.scores), dict(found.absent)
    if "total" not in scores:
        lacking = [name for name in DIMENSIONS if name not in scores]
        absent["total"] = f"{len(lacking)} of {len(DIMENSIONS)} dimensions lack: {', '.join(lacking)}"
    metrics |= {f"vbench_{name}": score for name, score in scores.items()}
    return metrics, {f"vbench_{name}": reason for name, reason in absent.items()}


def _named(plan: Plan) -> list[str]:
    """File names as VBench looks for them: of its own prompts `<prompt>-<number>.mp4`, else in the prompts' order."""
    if not plan.benchmark:
        return [f"{number:03d}.mp4" for number in range(len(plan.prompts))]
    seen: Counter[str] = Counter()
    names = []
    for prompt in plan.prompts:
        names.append(video_name(prompt, seen[prompt]))
        seen[prompt] += 1
    return names
