"""Components that decide what users get: evaluation with its gallery, and the gate."""

from typing import NamedTuple

from kfp import dsl

from components.image_names import EVALUATE


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def trained(
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    checkpoint: dsl.Output[dsl.Model],
) -> None:
    """Find the last training stage that an earlier run finished in the workdir."""
    from components.step import Job, find_step

    find_step("train_highres", checkpoint, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def evaluate(
    checkpoint: dsl.Input[dsl.Model],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    tracking_uri: str,
    manifest: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    gallery: dsl.Output[dsl.HTML],
) -> None:
    """Generate fixed prompts with every stage, measure, and show them."""
    import shutil

    from components.step import Job, log_metrics, run, track

    job = Job(profile, overrides, workdir, data_revision, code_revision)
    track(tracking_uri, job)
    report = run("evaluate", [checkpoint], manifest, job)
    log_metrics(metrics, report.metrics)
    shutil.copyfile(job.folder("evaluate") / "gallery.html", gallery.path)


@dsl.component(base_image=EVALUATE, install_kfp_package=False)
def promote(
    evaluate: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    tracking_uri: str,
    manifest: dsl.Output[dsl.Dataset],
    gate: dsl.Output[dsl.Markdown],
) -> NamedTuple("Verdict", [("promoted", bool)]):  # type: ignore[valid-type]
    """Pass the gate or say why not; the alias `champion` moves in the model registry."""
    import json
    import shutil
    from collections import namedtuple

    from components.step import Job, run, track

    job = Job(profile, overrides, workdir, data_revision, code_revision)
    track(tracking_uri, job)
    run("promote", [evaluate], manifest, job)
    shutil.copyfile(job.folder("promote") / "gate.md", gate.path)
    verdict = json.loads((job.folder("promote") / "gate.json").read_text())["verdict"]
    return namedtuple("Verdict", ["promoted"])(verdict == "promoted")
