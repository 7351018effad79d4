"""Raw videos in, a training set out: download, split, score, caption, encode."""

from collections import namedtuple
from typing import NamedTuple

from kfp import dsl

from components import data
from pipelines.placement import on_cpu, on_gpu, with_internet


@dsl.pipeline(name="opensora-data", description="Raw videos in, latents and text embeddings out.")
def data_pipeline(
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006 - KFP reads it as the default, and nobody changes it
    workdir: str = "/runs/default",
    data_revision: str = "",
    code_revision: str = "",
    shares: int = 4,
    remote: str = "",
) -> NamedTuple("Data", encode=dsl.Dataset, revision=str):
    """Every step works shard by shard: a loop does the shards side by side, then the step itself finishes.

    Args:
        profile: of params.yaml, which lies in the image.
        overrides: as `--set` takes them: ["download.source=s3://bucket/videos"].
        workdir: folder on the shared volume that holds all results of this run and of the runs that go on from it.
        data_revision: names the raw data; with `code_revision` it decides whether a cached result is of the same.
        code_revision: git commit or digest of the images. Unused by the steps; the cache sees it.
        remote: URL of a DVC remote, as s3://bucket/dvc, to which the training set is pushed; empty: none.
        shares: tasks that work side by side on a step's shards; tens, never thousands.
    """
    common = {"profile": profile, "overrides": overrides, "workdir": workdir}
    whole = {**common, "revision": f"{data_revision} {code_revision}"}

    world = on_cpu(data.demo_videos(**whole))
    download = with_internet(on_cpu(data.download(demo_videos=world.outputs["manifest"], **whole), "8"))
    listed = on_cpu(data.list_shares(count=shares), "1", "1Gi")

    with dsl.ParallelFor(listed.output, name="split-shares") as share:
        before = download.outputs["manifest"]
        loop = on_cpu(data.data_share(before=before, models=before, step="split", share=share, **common), "16", "32Gi")
        loop.set_display_name("split, one share")
    split = on_cpu(data.split(download=before, **whole).after(loop))

    with dsl.ParallelFor(listed.output, name="score-shares") as share:
        before = split.outputs["manifest"]
        loop = on_cpu(data.data_share(before=before, models=before, step="score", share=share, **common), "16", "32Gi")
        loop.set_display_name("score, one share")
    score = on_cpu(data.score(split=before, **whole).after(loop), memory="64Gi")

    models = on_cpu(data.demo_models(score=score.outputs["manifest"], **whole)).outputs["manifest"]

    with dsl.ParallelFor(listed.output, name="caption-shares") as share:
        before = score.outputs["manifest"]
        loop = on_gpu(data.gpu_share(before=before, models=models, step="caption", share=share, **common))
        loop.set_display_name("caption, one share")
    caption = on_cpu(data.caption(score=before, demo_models=models, **whole).after(loop))

    with dsl.ParallelFor(listed.output, name="encode-shares") as share:
        before = caption.outputs["manifest"]
        loop = on_gpu(data.gpu_share(before=before, models=models, step="encode", share=share, **common))
        loop.set_display_name("encode, one share")
    encode = on_cpu(data.encode(caption=before, demo_models=models, **whole).after(loop))
    made = encode.outputs["manifest"]
    revision = on_cpu(data.version(encode=made, remote=remote)).output
    return namedtuple("Data", ["encode", "revision"])(made, revision)
