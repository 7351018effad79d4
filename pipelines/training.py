"""The three training stages, each from the weights of the one before."""

from kfp import dsl

from components import data, training
from opensora.config import TRAIN_STEPS
from pipelines.placement import as_launcher, first, on_cpu


@dsl.pipeline(name="opensora-stages", description="Image, video and high-resolution stage.")
def stages(
    encode: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    image: str,
    tracking_uri: str,
    budget_dollars: float,
) -> dsl.Model:
    """Never cached: a stage whose folder is finished says so in seconds, and one that is not goes on."""
    common = {
        "encode": encode,
        "profile": profile,
        "overrides": overrides,
        "workdir": workdir,
        "data_revision": data_revision,
        "code_revision": code_revision,
        "image": image,
        "tracking_uri": tracking_uri,
        "budget_dollars": budget_dollars,
        "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    }
    image_stage = as_launcher(training.train_image(**common)).set_caching_options(False)
    video = as_launcher(training.train_video(train_image=image_stage.outputs["checkpoint"], **common))
    video.set_caching_options(False)
    last = as_launcher(training.train_highres(train_video=video.outputs["checkpoint"], **common))
    last.set_caching_options(False)
    return last.outputs["checkpoint"]


@dsl.pipeline(name="opensora-training", description="A training set in, three trained stages out.")
def training_pipeline(
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006
    workdir: str = "/runs/default",
    data_revision: str = "",
    code_revision: str = "",
    remote: str = "",
    image: str = "",
    tracking_uri: str = "",
    budget_dollars: float = 0.0,
) -> dsl.Model:
    """Train on a set that an earlier run left in the workdir, or that the DVC remote holds under `data_revision`.

    Args:
        remote: URL of the DVC remote; empty: the encode step of the workdir.
        image: of the training pods; empty trains in the launcher itself, which needs no cluster.
        tracking_uri: of the MLflow server; empty: a file below the workdir.
        budget_dollars: of each stage; one that is planned to cost more is refused before it starts. 0: no limit.
    """
    common = {"profile": profile, "overrides": overrides, "workdir": workdir, "code_revision": code_revision}
    weights = first(data.check_weights(**common, steps=[*TRAIN_STEPS]))
    found = on_cpu(data.restore(**common, data_revision=data_revision, remote=remote).after(weights))
    found.set_caching_options(False)
    return stages(
        **common,
        encode=found.outputs["manifest"],
        data_revision=found.outputs["Output"],
        image=image,
        tracking_uri=tracking_uri,
        budget_dollars=budget_dollars,
    ).output
