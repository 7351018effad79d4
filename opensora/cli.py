"""The command line: one verb a step, and `run`, `plan`, `generate`, `weights`, `results`, `config` around them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from opensora.chain import ALL_STEPS, SUMMARIES
from opensora.cli_options import PARAMS, RUNS, Params, Profile, Workdir
from opensora.data_cli import data
from opensora.plan_cli import plan
from opensora.registry_cli import promote, registry, rollback
from opensora.track_cli import track

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

weights = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at released weights, and import them.")
app.add_typer(weights, name="weights")
app.add_typer(data, name="data")
app.add_typer(track, name="track")
app.command()(plan)

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a value, as in --set train_video.lr=2e-5.")]
Source = Annotated[
    str, typer.Option("--source", help="Folder, list, archive, s3://bucket/folder or hf://datasets/owner/name.")
]

INTERRUPTED = 130  # exit code after Ctrl-C
RESUME = "stopped; start the same command again to resume"
TEXT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opensora" / "text"


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
        if name.startswith("train_"):  # answers signals itself: before torch is imported, and in its loop
            from opensora.training.stop import listen

            listen()
        from opensora.chain import run_step

        config = _config(params, profile, overrides)
        report = run_step(name, config, workdir)
        if os.environ.get("RANK", "0") == "0":  # of the processes that a launcher started
            _say(report, workdir / config.profile / name)

    command.__doc__ = SUMMARIES[name]
    return command


for _name in ALL_STEPS:
    app.command(_name)(promote if _name == "promote" else _step_command(_name))
app.command()(rollback)
app.command()(registry)


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
    """Run the whole chain on videos of yours, or on the embedded world.

    A stopped run goes on where it was; finished steps whose inputs did not change are not run again.
    """
    from opensora.chain import chain_steps
    from opensora.config import ConfigError
    from opensora.process import run_child

    config = _config(params, profile, overrides, source)
    prompts = config.evaluate.prompts_file
    if prompts and not Path(prompts).is_file():  # said now, not after the training
        raise ConfigError(f"evaluate.prompts_file: no file at {prompts}")
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
    profile: Annotated[
        str | None, typer.Option(help="Size of a released model: 16x256x256, 16x512x512 or 64x512x512.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames; default: as trained.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of the VAE's; default: as trained.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of the VAE's; default: as trained.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second; default: the profile's, else as evaluated.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="iddpm, ddim, dpm_solver or rectified_flow; default: as evaluated.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: as evaluated, or 100, 50, 20, 30 by sampler.", min=1)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale, 1 turns it off; default: as evaluated.")
    ] = None,
    guidance_mode: Annotated[
        str | None, typer.Option(help="v1: three of four channels, as released models were sampled; or full.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Videos at once; more are faster and need more memory.", min=1)] = 1,
    form: Annotated[str, typer.Option("--format", help="mp4, gif or png (a grid of all frames).")] = "mp4",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: as trained on a GPU, float32 on a CPU.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Folder of the VAE; default: the checkpoint's.")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="Folder of the T5; default: the checkpoint's.")] = None,
    text_cache: Annotated[
        Path, typer.Option(help="Folder that keeps embedded prompts.", show_default="~/.cache/opensora/text")
    ] = TEXT_CACHE,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("outputs"),
    workdir: Workdir = RUNS,
) -> None:
    """Make videos from prompts: a file each, and a line of JSON each in generated.jsonl.

    The same seed gives the same video, whatever else is in the batch. A stopped run goes on with what is missing.

    \b
    opensora generate --checkpoint models:/opensora-demo@champion --prompt "a red circle moving left"
    opensora generate --checkpoint weights/OpenSora-v1-HQ-16x256x256 --prompts-file prompts/scenes.txt
    """
    from opensora.config import ConfigError, one_of
    from opensora.generate import RELEASED_SIZES, Pipeline, choose_sampling, choose_size, read_prompts
    from opensora.generate import generate as make
    from opensora.training.checkpoint import describe_checkpoint

    pairs = [(text, seed + index) for index, text in enumerate(prompt or [])]
    if prompts_file:
        pairs += read_prompts(prompts_file, seed + len(pairs))
    if not pairs:
        raise ConfigError("no prompt; give --prompt TEXT or --prompts-file FILE, as prompts/scenes.txt")
    folder = Path(checkpoint)
    if checkpoint.startswith("models:/"):
        from opensora.tracking.version_files import model_version_path

        folder = model_version_path(checkpoint, workdir)
    described = describe_checkpoint(folder)
    changes = choose_size(described.train, described.info["vae_scale"], profile, frames, height, width)
    described = described.changed(changes)
    mode = one_of("--guidance-mode", guidance_mode, ("v1", "full"))
    chosen = one_of("--sampler", sampler, ("iddpm", "ddim", "dpm_solver", "rectified_flow"))
    sampling = choose_sampling(described, chosen, steps, guidance, mode)
    pipeline = Pipeline(
        described,
        dtype=one_of("--dtype", dtype, ("float32", "bfloat16")),
        vae=vae,
        text_encoder=text_encoder,
        text_cache=text_cache,
    )
    if fps is None:
        fps = RELEASED_SIZES[profile][1] if profile else described.config.evaluate.fps
    texts, seeds = [text for text, _ in pairs], [number for _, number in pairs]
    kind = one_of("--format", form, ("mp4", "gif", "png"))
    for path in make(pipeline, texts, seeds, out, sampling, fps=fps, batch_size=batch_size, form=kind):
        print(path)


@weights.command("inspect")
def weights_inspect(
    file: Annotated[Path, typer.Argument(help="A .pth, .pt, .bin or .safetensors file, or a diffusers folder.")],
) -> None:
    """Say of which model a released file is, its shape and size, and whether it can be imported.

    \b
    opensora weights inspect weights/OpenSora-v1-HQ-16x256x256.pth
    """
    from opensora.import_weights import inspect

    print(inspect(file))


@weights.command("import")
def weights_import(
    file: Annotated[Path, typer.Argument(help="A .pth, .pt, .bin or .safetensors file, or a diffusers folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint; default: the file's name beside it.")
    ] = None,
    allow_missing: Annotated[
        list[str] | None, typer.Option(help="Tensors that need not fit, as in 'blocks.*.attn_temp.*'; may be repeated.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Values that the file does not tell are those of this profile.")
    ] = "h800",
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Make a checkpoint of released weights (PixArt-α, Open-Sora 1.0), for generate and as init_from of a stage.

    Only tensors are read, never code. Everything in the file must fit, or is named.

    \b
    opensora weights import weights/OpenSora-v1-HQ-16x256x256.pth
    """
    from opensora.config import load_config, parse_overrides
    from opensora.import_weights import import_weights, summarise

    base, changes = load_config(params, profile), parse_overrides(tuple(overrides or ()))
    print(f"reading {file}", file=sys.stderr)
    target = out or (file.with_suffix("") if file.suffix else file.with_name(f"{file.name}-imported"))
    folder, report, config, stage = import_weights(file, target, base, changes, tuple(allow_missing or ()))
    train = getattr(config, stage)
    print(f"{len(report.loaded)} tensors mapped, {len(report.initial)} new, {len(report.ignored)} left out")
    lists = {"mapped": report.loaded, "new, with initial values": report.initial, "left out": report.ignored}
    for title, names in lists.items():
        if names:
            print(f"{title}: {summarise(names)}")
    print(f"{train.frames}x{train.height}x{train.width}, trained with {train.objective} → {folder}")
    print(f"next: opensora generate --checkpoint {target} --prompts-file prompts/scenes.txt")


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


@app.command()
def doctor(
    profile: Profile = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
    workdir: Workdir = RUNS,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check the cluster, too.")] = False,
    namespace: Annotated[str, typer.Option("--namespace", help="Where runs live on the cluster.")] = "opensora",
    queue: Annotated[str, typer.Option("--queue", help="Queue of the training jobs.")] = "opensora",
    kfp_host: Annotated[
        str, typer.Option("--kfp-host", envvar="KFP_HOST", help="Address of Kubeflow Pipelines.")
    ] = "http://localhost:8888",
) -> None:
    """Is this machine ready for a profile, and with --cluster the cluster? Says what to do where it is not."""
    from opensora.doctor import examine, examine_cluster, show

    good = show(examine(_config(params, profile, overrides), workdir))
    if cluster:
        good &= show(examine_cluster(namespace, queue, kfp_host))
    if not good:
        raise typer.Exit(1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def pipeline(context: typer.Context) -> None:
    """Compile the chain as Kubeflow pipelines, run it here or on a cluster; `opensora pipeline --help` tells more."""
    from importlib import import_module

    from opensora.config import ConfigError

    here = Path.cwd()
    if not (here / "pipelines" / "cli.py").is_file():  # not part of the wheel: a cluster runs what a checkout holds
        raise ConfigError(f"no folder `pipelines` in {here}; run `opensora pipeline` inside the project's checkout")
    sys.path.insert(0, str(here))
    import_module("pipelines.cli").main(context.args)


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
        from opensora.step import UNWRITABLE

        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {UNWRITABLE[error.errno]} and start the same command again to resume", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
