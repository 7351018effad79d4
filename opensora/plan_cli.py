"""The command `opensora plan`: what training will need, before it starts."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from opensora.cli_options import PARAMS, Params, Profile

if TYPE_CHECKING:
    from rich.console import RenderableType

    from opensora.config import Config
    from opensora.gpus import Gpu
    from opensora.plan import StagePlan

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value, as in --set train_video.batch_size=16; repeatable.")
]


def plan(
    profile: Profile = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of every stage; default: each stage's `processes`.", min=1)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Kind of GPU, as h100 or rtx4090; default: hardware.gpu, or the one that is here."),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="One stage alone, as train_video; default: all three.")] = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (bytes, seconds) and no table.")] = False,
) -> None:
    """Say what training will need: memory on each GPU by part, time, GPU-hours and dollars. Nothing is loaded.

    Memory and work are counted from the model's shapes; time assumes a share of the GPU's peak
    (hardware.utilization), money a price (hardware.dollars_per_gpu_hour). The exit code is 2 when a stage does not fit,
    and the message names settings that do. Training itself refuses such a stage, too.

    \b
    opensora plan --profile h800                                      the published recipe
    opensora plan --profile single_gpu --gpu rtx4090                  does it fit a 24 GB card?
    opensora plan --profile h800 --gpus 8 --gpu h100 --stage train_video --set train_video.batch_size=16
    """
    from opensora.config import TRAIN_STEPS, load_config, one_of
    from opensora.gpus import gpu_here, known_gpu
    from opensora.plan import check_fits, plan_stages

    one_of("--stage", stage, TRAIN_STEPS)
    stages = (stage,) if stage else TRAIN_STEPS
    changes = [f"{name}.processes={gpus}" for name in TRAIN_STEPS if gpus]
    changes += [f"hardware.gpu={gpu}"] if gpu else []
    config = load_config(params, profile, (*changes, *(overrides or ())))
    kind = known_gpu(config.hardware.gpu) if config.hardware.gpu else gpu_here()
    if kind and not config.hardware.gpu:
        config = config.model_copy(update={"hardware": config.hardware.model_copy(update={"gpu": kind.name})})
    plans = plan_stages(config, kind, stages)
    if as_json:
        print(json.dumps([made.as_dict() for made in plans], indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        what = f"{kind.name} of {kind.memory_gib:.0f} GiB" if kind else "GPU of unknown kind"
        console.print(f"{config.profile}: {plans[0].parameters:,} parameters, {what}", style="bold")
        console.print(table(plans, kind))
        for line in notes(plans, config, kind):
            console.print(line, style="dim", soft_wrap=True)
    for made in plans:
        check_fits(config, made.stage)


def table(plans: "list[StagePlan]", gpu: "Gpu | None") -> "RenderableType":
    """A column a stage."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(box=SIMPLE_HEAD)
    result.pad_edge, result.collapse_padding = False, True  # three stages in 80 columns
    result.add_column("", no_wrap=True)
    for made in plans:
        result.add_column(made.stage, justify="right", no_wrap=True)
    unit, size = ("GiB", 2**30) if max(made.memory.peak for made in plans) > 2**30 else ("MiB", 2**20)

    def row(name: str, values: list[str], style: str | None = None, end: bool = False) -> None:
        result.add_row(name, *values, style=style, end_section=end)

    row("a sample", ["x".join(map(str, made.shape)) for made in plans])
    row("samples a GPU, GPUs", [f"{made.batch_size} x {made.gpus}" for made in plans])
    row("strategy", ["\n".join(made.settings) for made in plans])
    row("parameters learning", [f"{made.trainable:,}" for made in plans], end=True)
    for name in dict.fromkeys(name for made in plans for name in made.memory.parts):
        parts = [made.memory.parts.get(name) for made in plans]
        row(name, ["" if value is None else f"{value / size:,.2f}" for value in parts])
    row(f"peak a GPU, {unit}", [f"{made.memory.peak / size:,.2f}" for made in plans], style="bold")
    if gpu:
        row("a GPU has", [f"{gpu.usable / size:,.2f}" for _ in plans])
        row("fits", ["yes" if made.fits else "[red]no[/red]" for made in plans])
        row("samples that fit", [f"{made.largest_batch:,}" for made in plans])
        row("frames that fit", [f"{made.largest_frames:,}" for made in plans], end=True)
    row("TFLOP a step and GPU", [f"{made.step_flops / 1e12:,.3g}" for made in plans])
    row("samples in all", [f"{made.samples_per_step * made.steps:,.0f}" for made in plans])
    row("steps", [f"{made.steps:,}" for made in plans])
    if gpu:
        row("seconds a step", [f"{made.step_seconds or 0:.2f}" for made in plans])
        row("days", [f"{made.days or 0:.2f}" for made in plans])
        row("GPU-hours", [f"{made.gpu_hours or 0:,.0f}" for made in plans], style="bold")
        row("dollars", [f"{made.dollars or 0:,.0f}" for made in plans], style="bold")
        if any(made.published_gpu_hours for made in plans):
            published = [made.published_gpu_hours for made in plans]
            row("GPU-hours, published", [f"{value:,.0f}" if value else "" for value in published])
    return result


def notes(plans: "list[StagePlan]", config: "Config", gpu: "Gpu | None") -> list[str]:
    """What the figures assume."""
    if gpu is None:
        return ["No time and no money without a kind of GPU: give --gpu, or set hardware.gpu."]
    price = config.hardware.dollars_per_gpu_hour or gpu.dollars_per_hour
    lines = [
        f"Time assumes {config.hardware.utilization:.0%} of {gpu.tflops:,.0f} TFLOP/s (hardware.utilization); "
        f"money ${price:.2f} a GPU-hour (hardware.dollars_per_gpu_hour)."
    ]
    hours, dollars = sum(made.gpu_hours or 0 for made in plans), sum(made.dollars or 0 for made in plans)
    if len(plans) > 1:
        lines.append(f"Together {hours:,.0f} GPU-hours and ${dollars:,.0f}.")
    return lines
