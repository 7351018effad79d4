"""Evaluate a trained model, let the gate judge it, promote it or say why not."""

from kfp import dsl

from components import data, release
from pipelines.placement import first, on_cpu, on_gpu

STEPS = ["evaluate", "promote"]
# A node, with a GPU for each of h800's evaluate.processes; each of them loads the text encoder, then model and VAE.
GPUS, CPU, MEMORY = 8, "64", "512Gi"


@dsl.pipeline(name="opensora-verdict", description="Evaluation, gate, promotion.")
def verdict(
    checkpoint: dsl.Input[dsl.Model],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    tracking_uri: str,
) -> bool:
    """Never cached. Returns whether the version was promoted; a refusal is a result, with its report, not a failure."""
    common = {
        "profile": profile,
        "overrides": overrides,
        "workdir": workdir,
        "data_revision": data_revision,
        "code_revision": code_revision,
        "tracking_uri": tracking_uri,
    }
    evaluate = on_gpu(release.evaluate(checkpoint=checkpoint, **common), GPUS, CPU, MEMORY)
    evaluate.set_caching_options(False)
    promote = on_cpu(release.promote(evaluate=evaluate.outputs["manifest"], **common)).set_caching_options(False)
    return promote.outputs["promoted"]


@dsl.pipeline(name="opensora-release", description="The model that lies in a workdir: evaluation, gate, promotion.")
def release_pipeline(
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006
    workdir: str = "/runs/default",
    data_revision: str = "",
    code_revision: str = "",
    tracking_uri: str = "",
) -> bool:
    """Judge what an earlier run trained in the workdir, as after a change of the prompts or of the gate."""
    common = {
        "profile": profile,
        "overrides": overrides,
        "workdir": workdir,
        "data_revision": data_revision,
        "code_revision": code_revision,
    }
    weights = first(
        data.check_weights(
            profile=profile, overrides=overrides, workdir=workdir, code_revision=code_revision, steps=STEPS
        )
    )
    found = on_cpu(release.trained(**common).after(weights)).set_caching_options(False)
    return verdict(checkpoint=found.outputs["checkpoint"], **common, tracking_uri=tracking_uri).output
