"""The whole chain: data, training, release."""

from kfp import dsl

from pipelines.data import data_pipeline
from pipelines.release import release_pipeline
from pipelines.training import training_pipeline


@dsl.pipeline(name="opensora-full", description="Raw videos in, a promoted text-to-video model out.")
def full_pipeline(
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006
    workdir: str = "/runs/default",
    data_revision: str = "",
    code_revision: str = "",
    shares: int = 4,
    image: str = "",
    tracking_uri: str = "",
    budget_dollars: float = 0.0,
    remote: str = "",
) -> bool:
    """The three pipelines, one after the other; see them for the parameters."""
    common = {"profile": profile, "overrides": overrides, "workdir": workdir}
    made = data_pipeline(
        **common, data_revision=data_revision, code_revision=code_revision, shares=shares, remote=remote
    )
    common["data_revision"] = made.outputs["revision"]
    training = training_pipeline(
        **common,
        encode=made.outputs["encode"],
        image=image,
        tracking_uri=tracking_uri,
        budget_dollars=budget_dollars,
    )
    return release_pipeline(**common, checkpoint=training.output, tracking_uri=tracking_uri).output
