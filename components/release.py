"""Components that decide what users get: evaluation with its gallery, and the gate."""

from typing import NamedTuple

from kfp import dsl

from components.image_names import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def evaluate(
    checkpoint: dsl.Input[dsl.Model],
    profile: str,
    overrides: list,
    workdir: str,
    revision: str,
    tracking_uri: str,
    manifest: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    gallery: dsl.Output[dsl.HTML],
) -> None:
    """Generate fixed prompts with every stage, measure, and show them."""
    import shutil
    from pathlib import Path

    from components.step import log_metrics, run, track

    track(tracking_uri, revision)
    report = run(
        "evaluate", [checkpoint], manifest, profile=profile, overrides=overrides, workdir=workdir, revision=revision
    )
    log_metrics(metrics, report.metrics)
    shutil.copyfile(Path(workdir) / profile / "evaluate" / "gallery.html", gallery.path)


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def promote(
    evaluate: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    revision: str,
    tracking_uri: str,
    manifest: dsl.Output[dsl.Dataset],
    gate: dsl.Output[dsl.Markdown],
) -> NamedTuple("Verdict", [("promoted", bool)]):  # type: ignore[valid-type]
    """Pass the gate or say why not; the alias `champion` moves in the model registry."""
    import json
    import shutil
    from collections import namedtuple
    from pathlib import Path

    from components.step import run, track

    track(tracking_uri, revision)
    run("promote", [evaluate], manifest, profile=profile, overrides=overrides, workdir=workdir, revision=revision)
    folder = Path(workdir) / profile / "promote"
    shutil.copyfile(folder / "gate.md", gate.path)
    verdict = json.loads((folder / "gate.json").read_text())["verdict"]
    return namedtuple("Verdict", ["promoted"])(verdict == "promoted")
