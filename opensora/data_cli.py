"""The commands `opensora data …`: look at a data set, and check it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from opensora.cli_options import PARAMS, RUNS, Params, Profile, Workdir

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the data of a chain, and check it.")

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a value, as in --set score.min_motion=0.1.")]

REPORT = "data_report.html"


@data.command()
def report(
    profile: Profile = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
    workdir: Workdir = RUNS,
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="WORKDIR/<profile>/data_report.html")
    ] = None,
) -> None:
    """Write one HTML page on the finished data steps: counts, histograms, thumbnails of kept and dropped clips.

    The page stands alone and loads nothing. It may be asked for after any data step.

    \b
    opensora data report --profile single_gpu
    """
    from opensora.config import load_config
    from opensora.data.reporting.report import write_report

    config = load_config(params, profile, tuple(overrides or ()))
    base = workdir / config.profile
    written = write_report(out or base / REPORT, base, config.score, config.score.workers)
    print(written.summary)
    print(written.path)


@data.command()
def validate(
    path: Annotated[
        Path,
        typer.Argument(help="A step's folder, a part of its manifest, or a csv, jsonl or parquet list."),
    ],
    deep: Annotated[bool, typer.Option(help="Read every clip and every latent too.")] = False,
    list_format: Annotated[
        str, typer.Option(help="Form of a published list, as download.list_format.", show_default="by its columns")
    ] = "",
    videos: Annotated[
        str,
        typer.Option(
            help="Folder or URL that a list's names are below, as download.videos.", show_default="the list's"
        ),
    ] = "",
    limit: Annotated[int, typer.Option(help="Problems printed; the rest is counted.", min=1)] = 50,
) -> None:
    """Say what is wrong with a manifest or a list, and where: a line a problem.

    Exit code 0: sound. 1: problems. 2: cannot be read at all.

    \b
    opensora data validate runs/demo/score
    opensora data validate runs/demo/encode --deep
    opensora data validate my_videos.csv
    """
    from opensora.data.validation.validate import validate as check

    count = 0
    for problem in check(path, deep, list_format, videos):
        count += 1
        if count <= limit:
            print(problem, flush=True)
    if count > limit:
        print(f"… and {count - limit:,} more; --limit {count} shows all")
    if count:
        print(f"{path}: {count:,} problem{'s' if count > 1 else ''}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{path}: sound")
