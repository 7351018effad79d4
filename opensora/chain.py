"""The chain: which step reads what, and the one function that runs a step for every driver."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the schema is heavy, and `opensora --help` only needs the names below
    from collections.abc import Iterator

    from opensora.config import Config
    from opensora.step import Report
    from opensora.training.stages import Source
    from opensora.weights import WeightsError

SUMMARIES = {
    "demo_videos": "Render the embedded world: videos of coloured shapes that move.",
    "download": "Fetch videos from a folder or a URL manifest and check that they decode.",
    "split": "Find shots and write them as normalised clips into tar shards.",
    "score": "Score every clip, then drop by thresholds; the reason is recorded.",
    "demo_models": "Train the tiny VAE and LLaVA and make the tiny T5 of the embedded world.",
    "caption": "Caption clips with LLaVA; captions that came with a video are kept.",
    "encode": "Write VAE latents of all frames and text embeddings into shards.",
    "train_image": "Train the image stage.",
    "train_video": "Train the video stage from the image stage.",
    "train_highres": "Train the high-resolution stage from the video stage.",
    "evaluate": "Generate fixed prompts with every stage, measure, and write the gallery.",
    "promote": "Pass the gate or say why not; the alias `champion` moves in the model registry.",
}
ALL_STEPS = tuple(SUMMARIES)


def chain_steps(config: "Config") -> list[str]:
    """The steps of this profile, in order."""
    skipped = set()
    if config.download.source or not config.demo.videos:
        skipped.add("demo_videos")
    if not config.demo.build_models:
        skipped.add("demo_models")
    return [name for name in ALL_STEPS if name not in skipped]


# What a folder of weights holds beside them; alternatives as `weights.find_weights` takes them.
MODEL = ("config.json",)
TEXT_MODEL = (*MODEL, "tokenizer.json|spiece.model|vocab.json")
CAPTION_MODEL = (*MODEL, "processor_config.json|preprocessor_config.json", "tokenizer.json|tokenizer.model|vocab.json")


def weights_of(step: str, config: "Config") -> dict[str, tuple[str, ...]]:
    """The pretrained weights that a step reads: name → files that their folder must hold, too."""
    from opensora.config import TRAIN_STEPS

    needed: dict[str, tuple[str, ...]] = {}
    built = config.demo.build_models
    encoders = {} if built else {config.encode.vae: MODEL, config.encode.text_encoder: TEXT_MODEL}
    match step:
        case "split":
            needed[config.split.transnetv2_file] = ()
        case "score":
            needed |= {config.score.clip: MODEL, config.score.aesthetic_head: ()}
        case "caption":
            needed[config.score.clip] = MODEL
            if config.caption.backend == "llava" and not built:
                needed[config.caption.model] = CAPTION_MODEL
        case "encode":
            needed |= encoders
        case "evaluate":
            judges = config.evaluate
            needed |= encoders | dict.fromkeys((judges.videomae, judges.i3d, judges.inception, judges.clip), ())
        case _ if step in TRAIN_STEPS:
            train = getattr(config, step)
            needed[train.init_from] = ()
            needed |= encoders if train.data == "clips" or train.sample_every else {}
    return {name: files for name, files in needed.items() if name}


def look_for_weights(config: "Config", steps: Iterable[str]) -> "Iterator[tuple[str, list[str], Path | WeightsError]]":
    """Look on this machine for all that the steps will read: name, steps that read it, where it lies or why not."""
    from opensora.weights import WeightsError, find_weights

    readers: dict[str, list[str]] = {}
    files: dict[str, tuple[str, ...]] = {}
    for step in steps:
        for name, wanted in weights_of(step, config).items():
            readers.setdefault(name, []).append(step)
            files[name] = wanted or files.get(name, ())
    for name, who in readers.items():
        try:
            yield name, who, find_weights(name, Path(config.weights_dir), True, files[name])
        except WeightsError as error:
            yield name, who, error


def check_weights(config: "Config", steps: Iterable[str], advice: str = "") -> list[str]:
    """Look for all weights that the steps will read, before any of them begins; returns what was found, a line each.

    Args:
        advice: how missing ones are brought to where they were looked for.

    Raises:
        WeightsError: some are missing or not whole; all of them are named, with the steps that read them.
    """
    from opensora.weights import MISSING, NoWeights, WeightsError

    found, missing, broken = [], [], []
    for name, readers, place in look_for_weights(config, steps):
        what = f"{name} (for {', '.join(readers)})"
        if isinstance(place, Path):
            found.append(f"{what}: {place}")
        elif not isinstance(place, NoWeights):
            broken.append(f"{place.reason} (for {', '.join(readers)})")
        elif config.offline:
            missing.append(what)
    if missing:
        places = " nor in ".join(dict.fromkeys(map(str, (Path.cwd(), Path(config.weights_dir).absolute()))))
        broken.insert(0, f"{', '.join(missing)}, neither in {places}")
    if broken:
        raise WeightsError(f"profile {config.profile} lacks weights: {'; '.join(broken)}", advice or MISSING)
    return found


def run_step(name: str, config: "Config", root: Path) -> "Report":
    """Run one step of the chain below `root/<profile>/` and return its report.

    Raises:
        UserError: what the step raises; see its module.
    """
    from opensora.config import TRAIN_STEPS, ConfigError

    base = root / config.profile
    base.mkdir(parents=True, exist_ok=True)
    output = base / name
    match name:
        case "demo_videos":
            from opensora.demo.videos import run as demo_videos

            return demo_videos(config.demo, output)
        case "demo_models":
            from opensora.demo.models import run as demo_models

            return demo_models(config, base / "score", base / "split", output)
        case "download":
            return _download(config, base, output)
        case "split":
            from opensora.data.split import run as split

            transnetv2 = optional_weights(config, config.split.transnetv2_file)
            return split(config.split, base / "download", output, config.executor, transnetv2=transnetv2)
        case "score":
            from opensora.data.score import run as score

            clip = optional_weights(config, config.score.clip)
            head = optional_weights(config, config.score.aesthetic_head)
            return score(config.score, base / "split", output, config.executor, clip=clip, head=head)
        case "caption":
            from opensora.data.caption import run as caption

            local = config.caption.backend == "llava"
            model = weights_folder(config, base, config.caption.model, CAPTION_MODEL) if local else None
            return caption(
                config.caption,
                base / "score",
                base / "split",
                model,
                output,
                config.executor,
                clip=optional_weights(config, config.score.clip),
                min_text_match=config.score.min_text_match,
            )
        case "encode":
            from opensora.data.encode import run as encode

            vae, text = encoder_folders(config, base)
            return encode(config.encode, base / "caption", base / "split", vae, text, output, config.executor)
        case "evaluate":
            return _evaluate(config, base, output, root)
        case "promote":
            from opensora.promote import run as promote

            return promote(config.promote, config.profile, *promotion_inputs(config, base), root, output)
        case _ if name in TRAIN_STEPS:
            from opensora.training.stages import run as train
            from opensora.training.stages import stage_before

            before = stage_before(name)
            source = training_source(config, name, base)
            return train(config, name, source, base / before if before else None, output, root)
    raise ConfigError(f"unknown step {name!r}; one of {', '.join(ALL_STEPS)}")


def training_source(config: "Config", stage: str, base: Path) -> "Source":
    """What a stage reads: latents of the encode step, or clips and the models that encode them."""
    from opensora.training.stages import Source

    if getattr(config, stage).data == "latents":
        return Source(base / "encode")
    return Source(base / "caption", base / "split", *encoder_folders(config, base))


def promotion_inputs(config: "Config", base: Path) -> tuple[Path, Path, Path]:
    """What the gate reads: folders of the evaluation, of the last stage, and of the data that it was trained on."""
    from opensora.config import TRAIN_STEPS

    last = TRAIN_STEPS[-1]
    data = "encode" if getattr(config, last).data == "latents" else "caption"
    return base / "evaluate", base / last, base / data


def weights_folder(config: "Config", base: Path, name: str, files: tuple[str, ...]) -> Path:
    """The folder of a pretrained model, which holds `files` too, or of a demo-built one."""
    if config.demo.build_models:
        return base / "demo_models" / name
    from opensora.weights import find_weights

    return find_weights(name, Path(config.weights_dir), config.offline, files)


def encoder_folders(config: "Config", base: Path) -> tuple[Path, Path]:
    """The folders of the VAE and of the text encoder."""
    vae = weights_folder(config, base, config.encode.vae, MODEL)
    return vae, weights_folder(config, base, config.encode.text_encoder, TEXT_MODEL)


def optional_weights(config: "Config", name: str) -> Path | None:
    """A file or folder below weights_dir, or None where no name is configured."""
    from opensora.weights import find_weights

    return find_weights(name, Path(config.weights_dir), config.offline) if name else None


def _download(config: "Config", base: Path, output: Path) -> "Report":
    from opensora.config import ConfigError
    from opensora.data.download import run as download

    source = config.download.source
    if source:
        return download(config.download, source, output, config.executor)
    if not config.demo.videos:
        raise ConfigError(f"profile {config.profile} has no videos of its own; give --source FOLDER or a URL manifest")
    from opensora.demo.server import serve

    # The embedded world is fetched over HTTP, so that the demo downloads as real use does.
    with serve(base / "demo_videos") as url:
        local = config.download.model_copy(update={"allow_private_hosts": True})
        return download(local, f"{url}/manifest.csv", output, config.executor)


def _evaluate(config: "Config", base: Path, output: Path, root: Path) -> "Report":
    from opensora.config import TRAIN_STEPS
    from opensora.evaluate import run as evaluate
    from opensora.evaluation.plan import Data
    from opensora.step import read_report

    finished = [name for name in chain_steps(config) if (base / name / "report.json").is_file()]
    reports = {name: read_report(base / name) for name in finished if name not in ("evaluate", "promote")}
    seconds = {name: report.seconds for name, report in reports.items()}
    peak = max((report.peak_memory_mib for report in reports.values()), default=0.0)
    extra: dict[str, float] = {}
    data: Data | None = Data(base / "caption", base / "split")
    truth = base / "demo_videos" / "truth.json"
    if truth.is_file() and not config.download.source:
        from opensora.demo.captioner import caption_exact_match

        extra["caption_exact_match"] = caption_exact_match(base / "caption", truth)
        data = None  # the embedded world renders its real clips
    return evaluate(
        config,
        {name: base / name for name in TRAIN_STEPS},
        output,
        root,
        data=data,
        weights={
            name: optional_weights(config, getattr(config.evaluate, name))
            for name in ("videomae", "i3d", "inception", "clip")
        },
        extra=extra,
        seconds=seconds,
        peak_memory_mib=peak,
    )
