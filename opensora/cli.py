"""The command line: one verb a step, and `run`, `generate`, `results`, `config` around them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from opensora.chain import ALL_STEPS, SUMMARIES

# Nothing here calls home; the libraries behind the steps read these when they are imported.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Raw videos in, a promoted text-to-video model out. The steps, in order: " + " → ".join(ALL_STEPS) + ".",
)

Profile = Annotated[
    str | None, typer.Option("--profile", help="smoke, demo, single_gpu or h800; default: as in params.yaml.")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a value, as in --set train_video.lr=2e-5.")]
Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
Workdir = Annotated[Path, typer.Option("--workdir", help="Root of the results: WORKDIR/<profile>/<step>/.")]
Source = Annotated[str, typer.Option("--source", help="Folder of videos, or a csv, jsonl or parquet list of URLs.")]

PARAMS = Path("params.yaml")
INTERRUPTED = 130  # exit code after Ctrl-C
RESUME = "stopped; start the same command again to resume"
RUNS = Path("runs")


def _config(params: Path, profile: str | None, overrides: list[str] | None, source: str = "") -> Any:
    from opensora.config import load_config

    changes = [*(overrides or [])]
    if source:
        changes.append(f"download.source={json.dumps(source)}")
    return load_config(params, profile, tuple(changes))


def _step_command(name: str) -> Callable[..., None]:
    def command(
        profile: Profile = None, overrides: Overrides = None, params: Params = PARAMS, workdir: Workdir = RUNS
    ) -> None:
        from opensora.chain import run_step

        config = _config(params, profile, overrides)
        _say(run_step(name, config, workdir), workdir / config.profile / name)

    command.__doc__ = SUMMARIES[name]
    return command


for _name in ALL_STEPS:
    app.command(_name)(_step_command(_name))


def _say(report: Any, folder: Path) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report.dropped.items()))
    counts = f"{report.kept} of {report.total} kept" + (f" (dropped: {reasons})" if reasons else "")
    print(f"{report.step}: {counts} in {report.seconds:.1f} s → {folder}")


@app.command()
def run(
    profile: Profile = None,
    source: Source = "",
    overrides: Overrides = None,
    params: Params = PARAMS,
    workdir: Workdir = RUNS,
) -> None:
    """Run the whole chain on a folder of videos, a list of URLs, or the embedded world.

    A stopped run goes on where it was; finished steps whose inputs did not change are not run again.
    """
    from opensora.chain import chain_steps
    from opensora.process import run_child

    config = _config(params, profile, overrides, source)
    common = ["--profile", config.profile, "--params", str(params), "--workdir", str(workdir)]
    for text in overrides or []:
        common += ["--set", text]
    if source:
        common += ["--set", f"download.source={json.dumps(source)}"]
    # A process a step: memory is given back, and the heavy libraries of one step do not slow the next.
    for name in chain_steps(config):
        print(f"── {name}", flush=True)
        try:
            code = run_child([sys.executable, "-m", "opensora.cli", name, *common])
        except KeyboardInterrupt:
            print(RESUME, file=sys.stderr)
            raise
        if code:
            raise typer.Exit(code if code > 0 else 128 - code)
    from opensora.results import describe

    print(describe(config, workdir))


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint folder, or models:/NAME@ALIAS from the registry.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What the video shows; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt a line, a seed after a tab if wanted.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next one takes the next seed.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: as evaluated.", min=1)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale, 1 turns it off; default: as evaluated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the mp4 files.")] = Path("outputs"),
    fps: Annotated[int, typer.Option(help="Frames a second.", min=1)] = 8,
    workdir: Workdir = RUNS,
) -> None:
    """Make videos from prompts: mp4 files and a line of JSON each in generated.jsonl."""
    from opensora.config import ConfigError
    from opensora.generate import generate as make
    from opensora.generate import read_prompts

    pairs = [(text, seed + index) for index, text in enumerate(prompt or [])]
    if prompts_file:
        pairs += read_prompts(prompts_file, seed + len(pairs))
    if not pairs:
        raise ConfigError("no prompt; give --prompt TEXT or --prompts-file FILE")
    folder = Path(checkpoint)
    if checkpoint.startswith("models:/"):
        from opensora.tracking import model_version_path

        folder = model_version_path(checkpoint, workdir)
    texts, seeds = [text for text, _ in pairs], [number for _, number in pairs]
    for path in make(folder, texts, seeds, out, steps=steps, guidance=guidance, fps=fps):
        print(path)


@app.command()
def results(profile: Profile = None, params: Params = PARAMS, workdir: Workdir = RUNS) -> None:
    """Say what a finished chain reached and where its results lie."""
    from opensora.results import describe

    print(describe(_config(params, profile, None), workdir))


@app.command("config")
def show_config(profile: Profile = None, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Print the resolved values of a profile."""
    import yaml

    print(yaml.safe_dump(_config(params, profile, overrides).model_dump(mode="json"), sort_keys=False), end="")


def main() -> None:
    """Entry point: one clear line and an exit code for every error that a user can mend."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from opensora.config import UserError

    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED and sys.argv[1:2] != ["run"]:  # `run` or its step has said it
            print(RESUME, file=sys.stderr)
        raise
    except OSError as error:
        if error.errno != 28:  # ENOSPC
            raise
        print("error: the disk is full; free some space and start the same command again to resume", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
