"""The whole chain: data, training, release."""

from kfp import dsl

from components import data
from opensora.config import STEPS
from pipelines.data import training_set
from pipelines.placement import first
from pipelines.release import verdict
from pipelines.training import stages


@dsl.pipeline(name="opensora-full", description="Raw videos in, a promoted text-to-video model out.")
def full_pipeline(
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006
    workdir: str = "/runs/default",
    data_revision: str = "",
    code_revision: str = "",
    shares: int = 4,
    caption_on_gpu: bool = True,
    remote: str = "",
    image: str = "",
    tracking_uri: str = "",
    budget_dollars: float = 0.0,
) -> bool:
    """The three pipelines, one after the other; see them for the parameters."""
    common = {"profile": profile, "overrides": overrides, "workdir": workdir, "code_revision": code_revision}
    weights = first(data.check_weights(**common, steps=[*STEPS]))
    made = training_set(
        **common, data_revision=data_revision, shares=shares, caption_on_gpu=caption_on_gpu, remote=remote
    ).after(weights)
    common["data_revision"] = made.outputs["data_revision"]
    trained = stages(
        **common,
        encode=made.outputs["encode"],
        image=image,
        tracking_uri=tracking_uri,
        budget_dollars=budget_dollars,
    )
    return verdict(**common, checkpoint=trained.output, tracking_uri=tracking_uri).output
