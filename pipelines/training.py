"""The three training stages, each from the weights of the one before."""

from kfp import dsl

from components import training
from pipelines.placement import as_launcher


@dsl.pipeline(name="opensora-training", description="Image, video and high-resolution stage.")
def training_pipeline(
    encode: dsl.Input[dsl.Dataset],
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006
    workdir: str = "/runs/default",
    data_revision: str = "",
    image: str = "",
    tracking_uri: str = "",
    budget_dollars: float = 0.0,
) -> dsl.Model:
    """Never cached: a stage whose folder is finished says so in seconds, and one that is not goes on.

    Args:
        image: of the training pods; empty trains in the launcher itself, which needs no cluster.
        budget_dollars: of each stage; one that is planned to cost more is refused before it starts. 0: no limit.
    """
    common = {
        "encode": encode,
        "profile": profile,
        "overrides": overrides,
        "workdir": workdir,
        "revision": data_revision,
        "image": image,
        "tracking_uri": tracking_uri,
        "budget_dollars": budget_dollars,
        "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    }
    first = as_launcher(training.train_image(**common)).set_caching_options(False)
    video = as_launcher(training.train_video(train_image=first.outputs["checkpoint"], **common))
    video.set_caching_options(False)
    last = as_launcher(training.train_highres(train_video=video.outputs["checkpoint"], **common))
    last.set_caching_options(False)
    return last.outputs["checkpoint"]
