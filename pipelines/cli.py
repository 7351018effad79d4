"""`opensora pipeline`: compile, run here, submit, look at, cancel."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.compile import PIPELINES, PipelineError, compile_pipeline

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The chain as Kubeflow pipelines: data, training, release, or full for all of them.",
)

Name = Annotated[str, typer.Argument(help=f"One of {', '.join(PIPELINES)}.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", help="A pipeline parameter, as in -p profile=h800 -p shares=16."),
]
Images = Annotated[
    Path | None, typer.Option("--images", help="JSON: name of each image → registry/name@sha256:…, of `make images`.")
]
Host = Annotated[str, typer.Option("--host", envvar="KFP_HOST", help="Address of Kubeflow Pipelines.")]
Namespace = Annotated[str, typer.Option("--namespace", help="Where runs live.")]


def parameters_of(texts: list[str] | None) -> dict[str, Any]:
    """`shares=16` → {"shares": 16}; values in JSON form, else text."""
    values: dict[str, Any] = {}
    for text in texts or []:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise PipelineError(f"--parameter {text!r}: expected name=value, as in profile=h800")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def images_of(path: Path | None) -> dict[str, str]:
    """The images' names in a registry; none without a file."""
    if path is None:
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise PipelineError(f"--images {path}: {error}") from None


@app.command("compile")
def compile_command(
    name: Name = "full",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the YAML goes.")] = Path("pipeline.yaml"),
    images: Images = None,
    parameters: Parameters = None,
) -> None:
    """Write a pipeline's YAML."""
    loose = compile_pipeline(name, output, images_of(images), parameters_of(parameters))
    print(f"{name} → {output}")
    if loose:
        print(f"not pinned by digest: {', '.join(loose)} (give --images FILE)")


@app.command("run-local")
def run_local_command(
    name: Name = "full",
    workdir: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/kfp"),
    parameters: Parameters = None,
) -> None:
    """Run a compiled pipeline on this machine with KFP's own local runner; by default all of the smoke profile."""
    from pipelines.local import run_local

    values = {"profile": "smoke", "workdir": str(workdir.resolve()), "shares": 2} | parameters_of(parameters)
    workdir.mkdir(parents=True, exist_ok=True)
    compiled = workdir / f"{name}.yaml"
    compile_pipeline(name, compiled, {}, {})
    output = run_local(compiled, values, workdir / "artifacts")
    print(f"{name}: {output}; results in {workdir}")


@app.command()
def submit(
    name: Name = "full",
    host: Host = "http://localhost:8888",
    namespace: Namespace = "opensora",
    images: Images = None,
    parameters: Parameters = None,
    experiment: Annotated[str, typer.Option(help="Experiment that the run belongs to.")] = "opensora",
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Submit uncommitted code all the same.")] = False,
) -> None:
    """Compile a pipeline, start a run of it, and print where it is shown."""
    from pipelines import remote

    commit = remote.revision(allow_dirty)
    compiled = Path(".pipelines") / f"{name}-{commit[:9]}.yaml"
    loose = compile_pipeline(name, compiled, images_of(images), {})
    if loose:
        raise PipelineError(f"images not pinned by digest: {', '.join(loose)}; give --images FILE, of `make images`")
    values = parameters_of(parameters)
    if name in ("data", "full"):
        values.setdefault("code_revision", commit)
    run_id = remote.submit(remote.client(host, namespace), compiled, values, experiment, namespace)
    print(f"run {run_id}\n{remote.url(host, run_id)}")


@app.command()
def status(run_id: str, host: Host = "http://localhost:8888", namespace: Namespace = "opensora") -> None:
    """Say how far a run is, task by task."""
    from pipelines import remote

    print(remote.status(remote.client(host, namespace), run_id))


@app.command()
def cancel(run_id: str, host: Host = "http://localhost:8888", namespace: Namespace = "opensora") -> None:
    """End a run; its training jobs are deleted, their checkpoints stay."""
    from pipelines import remote

    remote.cancel(remote.client(host, namespace), run_id)
    print(f"run {run_id} is being ended")


def main(arguments: list[str]) -> None:
    """Entry point of `opensora pipeline`."""
    try:
        app(arguments, prog_name="opensora pipeline")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
