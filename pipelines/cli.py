"""`opensora pipeline`: compile, run here, submit, look at, cancel."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from components.image_names import TRAIN
from pipelines.compile import PIPELINES, PipelineError, compile_pipeline
from pipelines.parameters import parameters_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""The chain as Kubeflow pipelines.

    \b
    data      raw videos → training set: download, split, score, caption, encode
    training  training set → three trained stages
    release   trained stages → evaluated, judged, promoted or not
    full      all of them

    \b
    opensora pipeline run-local                         # no cluster: the smoke chain, in two minutes
    opensora pipeline compile full --images images.json -o full.yaml
    opensora pipeline submit full --images build/images/images.json -p profile=h800 -p shares=32
    opensora pipeline status RUN

    docs/cluster.md leads from an empty cluster to a run. `opensora pipeline COMMAND --help` tells more.
    """,
)

Name = Annotated[str, typer.Argument(help=f"One of {', '.join(PIPELINES)}.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        "-p",
        help="A parameter of the pipeline, as in -p profile=h800 -p shares=16; may be repeated. Values that are lists "
        "are JSON. A name that does not exist shows all.",
    ),
]
Images = Annotated[
    Path | None, typer.Option("--images", help="JSON: name of each image → registry/name@sha256:…, of `make images`.")
]
Host = Annotated[
    str, typer.Option("--host", envvar="KFP_HOST", help="Address of the API; its token: KFP_TOKEN or KFP_TOKEN_FILE.")
]
Namespace = Annotated[str, typer.Option("--namespace", help="Where runs live.")]
Run = Annotated[str, typer.Argument(help="Id of the run, as `submit` printed it.", metavar="RUN")]
HOST, NAMESPACE = "http://localhost:8888", "opensora"


def images_of(path: Path | None) -> dict[str, str]:
    """The images' names in a registry; none without a file."""
    if path is None:
        return {}
    try:
        images = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(f"--images {path}: {error}") from None
    if not isinstance(images, dict):
        raise PipelineError(f"--images {path}: expected an object, the name of each image → registry/name@sha256:…")
    return images


@app.command("compile")
def compile_command(
    name: Name = "full",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the YAML goes.")] = Path("pipeline.yaml"),
    images: Images = None,
    parameters: Parameters = None,
) -> None:
    """Write a pipeline's YAML, to look at or to upload by hand; parameters become its defaults."""
    loose = compile_pipeline(name, output, images_of(images), parameters_of(parameters or [], name))
    print(f"{name} → {output}")
    if loose:
        print(f"not pinned by digest: {', '.join(loose)} (give --images FILE)")


@app.command("run-local")
def run_local_command(
    name: Name = "full",
    workdir: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/kfp"),
    parameters: Parameters = None,
) -> None:
    """Run a compiled pipeline on this machine with KFP's own local runner; by default all of the smoke profile.

    A second run of the same folder repeats nothing whose inputs did not change; a stopped one goes on.

    \b
    opensora pipeline run-local data -p 'overrides=["download.source=/data/videos"]'
    opensora pipeline run-local training -p profile=smoke
    """
    from pipelines.local import run_local

    given = parameters_of(parameters or [], name)
    values = {"profile": "smoke", "workdir": str(workdir.resolve())} | ({"shares": 2} if takes_shares(name) else {})
    workdir.mkdir(parents=True, exist_ok=True)
    compiled = workdir / f"{name}.yaml"
    compile_pipeline(name, compiled, {}, {})
    outputs = run_local(compiled, values | given, workdir / "artifacts")
    said = ", ".join(str(getattr(value, "uri", value)) for value in outputs.values())
    print(f"{name}: {said}; results in {workdir}")


def takes_shares(name: str) -> bool:
    """Whether the pipeline has loops over shards."""
    return name in ("data", "full")


@app.command()
def submit(
    name: Name = "full",
    host: Host = HOST,
    namespace: Namespace = NAMESPACE,
    images: Images = None,
    parameters: Parameters = None,
    experiment: Annotated[str, typer.Option(help="Experiment that the run belongs to.")] = "opensora",
    page: Annotated[
        str, typer.Option("--page", envvar="KFP_PAGE", help="Address of the web page, if it is not the API's.")
    ] = "",
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Submit uncommitted code all the same.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Take no result from KFP's cache, as after a workdir was emptied.")
    ] = False,
) -> None:
    """Compile a pipeline, start a run of it, and print where it is shown.

    A run names its code: a tree that differs from its commit, or an image without a digest, is refused. The nodes of
    training run in the train image of that file, unless -p image=… names another.

    \b
    opensora pipeline submit full --images images.json -p profile=h800 -p workdir=/runs/first -p shares=32
    """
    from pipelines import remote

    commit = remote.revision(allow_dirty)
    names = images_of(images)
    values: dict[str, Any] = {"code_revision": commit}
    if name in ("training", "full") and TRAIN in names:
        values["image"] = names[TRAIN]  # of the TrainJobs' pods, which no task of the pipeline runs in
    values |= parameters_of(parameters or [], name)
    compiled = Path(".pipelines") / f"{name}-{commit[:9]}.yaml"
    loose = compile_pipeline(name, compiled, names, {}, cache=not no_cache)
    if loose:
        raise PipelineError(f"images not pinned by digest: {', '.join(loose)}; give --images FILE, of `make images`")
    if name in ("training", "full") and not values.get("image"):
        raise PipelineError("no image for the nodes of training; give --images with the train image, or -p image=…")
    title = f"{name} {commit[:9]} {datetime.now():%Y-%m-%d %H:%M}"
    run_id = remote.submit(host, namespace, compiled, values, experiment, title)
    print(f"run {run_id}\n{remote.url(page or host, run_id)}")
    print(f"next: opensora pipeline status {run_id}")


@app.command()
def status(run: Run, host: Host = HOST, namespace: Namespace = NAMESPACE) -> None:
    """Say how far a run is, task by task; a failed task says why."""
    from pipelines import remote

    print(remote.status(host, namespace, run))


@app.command()
def cancel(run: Run, host: Host = HOST, namespace: Namespace = NAMESPACE) -> None:
    """End a run and delete its training jobs; their checkpoints stay.

    The jobs are deleted in the cluster of your kubeconfig; without one, by what is told to type.
    """
    from pipelines import remote

    print(remote.cancel(host, namespace, run))
    print("the next run of the same workdir goes on from its checkpoints")


def main(arguments: list[str]) -> None:
    """Entry point of `opensora pipeline`."""
    try:
        app(arguments, prog_name="opensora pipeline")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("kfp", "kfp_server_api"):
            raise
        print("error: KFP is not installed: pip install 'opensora-workflow[kubeflow]'", file=sys.stderr)
        sys.exit(1)
