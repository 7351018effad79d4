"""Options that many commands share, with their defaults."""

from pathlib import Path
from typing import Annotated

import typer

Profile = Annotated[
    str | None, typer.Option("--profile", help="smoke, demo, single_gpu or h800; default: as in params.yaml.")
]
Params = Annotated[Path, typer.Option("--params", envvar="OPENSORA_PARAMS", help="Parameter file.")]
Workdir = Annotated[Path, typer.Option("--workdir", help="Root of the results: WORKDIR/<profile>/<step>/.")]

PARAMS = Path("params.yaml")
RUNS = Path("runs")
