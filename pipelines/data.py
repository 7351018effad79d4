"""The data pipeline: raw videos in, a training set out: download, split, score, caption, encode."""

from typing import NamedTuple

from kfp import dsl

from components import data
from opensora.config import DATA_STEPS
from pipelines.placement import first, on_cpu, on_gpu, with_internet


class Data(NamedTuple):
    """A finished training set and what names it."""

    encode: dsl.Dataset
    data_revision: str


@dsl.pipeline(name="opensora-training-set", description="Raw videos in, latents and text embeddings out.")
def training_set(
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    shares: int,
    caption_on_gpu: bool,
    remote: str,
) -> Data:
    """Every step works shard by shard: a loop does the shards side by side, then the step itself finishes.

    KFP's cache compares a task's parameters, image, command and claims, and its input artifacts by name, never by what
    lies behind them. So both revisions are parameters of every task, of the shares too, which leave only shards. A task
    that finishes a step may have to do what a share left, so it has as many CPUs.
    """
    job = {
        "profile": profile,
        "overrides": overrides,
        "workdir": workdir,
        "data_revision": data_revision,
        "code_revision": code_revision,
    }
    videos = on_cpu(data.demo_videos(**job)).outputs["manifest"]
    names = on_cpu(data.list_shares(count=shares), "1", "1Gi").output

    with dsl.ParallelFor(names, name="download-shares") as share:
        part = on_cpu(data.data_share(before=videos, models=videos, step="download", share=share, **job), "8")
        with_internet(part).set_display_name("download, one share")
    download = with_internet(on_cpu(data.download(demo_videos=videos, **job).after(part), "8"))

    before = download.outputs["manifest"]
    with dsl.ParallelFor(names, name="split-shares") as share:
        part = on_cpu(data.data_share(before=before, models=before, step="split", share=share, **job), "16", "32Gi")
        part.set_display_name("split, one share")
    split = on_cpu(data.split(download=before, **job).after(part), "16", "32Gi")

    before = split.outputs["manifest"]
    with dsl.ParallelFor(names, name="score-shares") as share:
        part = on_cpu(data.data_share(before=before, models=before, step="score", share=share, **job), "16", "32Gi")
        part.set_display_name("score, one share")
    score = on_cpu(data.score(split=before, **job).after(part), "16", "64Gi")

    before = score.outputs["manifest"]
    models = on_cpu(data.demo_models(score=before, **job)).outputs["manifest"]
    # Both branches of a condition are one task of the graph, which succeeds whichever was taken.
    on_gpus = dsl.If(caption_on_gpu == True)  # noqa: E712 - KFP reads the comparison
    with on_gpus, dsl.ParallelFor(names, name="caption-shares-gpu") as share:
        part = on_gpu(data.gpu_share(before=before, models=models, step="caption", share=share, **job))
        part.set_display_name("caption, one share")
    with dsl.Else(), dsl.ParallelFor(names, name="caption-shares-cpu") as share:
        other = on_cpu(data.data_share(before=before, models=models, step="caption", share=share, **job))
        other.set_display_name("caption by a server, one share")
    caption = on_cpu(data.caption(score=before, demo_models=models, **job).after(part, other))

    before = caption.outputs["manifest"]
    with dsl.ParallelFor(names, name="encode-shares") as share:
        part = on_gpu(data.gpu_share(before=before, models=models, step="encode", share=share, **job))
        part.set_display_name("encode, one share")
    encode = on_cpu(data.encode(caption=before, demo_models=models, **job).after(part)).outputs["manifest"]
    # Not from the cache: a remote that was emptied gets the data again, and one that holds it costs a look.
    version = on_cpu(data.version(encode=encode, remote=remote)).set_caching_options(False)
    return Data(encode, version.output)


@dsl.pipeline(name="opensora-data", description="Raw videos in, latents and text embeddings out.")
def data_pipeline(
    profile: str = "smoke",
    overrides: list = [],  # noqa: B006 - KFP reads it as the default, and nobody changes it
    workdir: str = "/runs/default",
    data_revision: str = "",
    code_revision: str = "",
    shares: int = 4,
    caption_on_gpu: bool = True,
    remote: str = "",
) -> Data:
    """The data steps, once the weights that they read are known to be there.

    Args:
        profile: of params.yaml, which lies in the image.
        overrides: as `--set` takes them: ["download.source=s3://bucket/videos"].
        workdir: folder on the shared volume that holds all results of this run and of the runs that go on from it.
        data_revision: names the raw data: another one, and nothing is taken from the cache.
        code_revision: commit that the images were made of; `opensora pipeline submit` fills it in.
        shares: tasks that work side by side on a step's shards; tens, never thousands.
        caption_on_gpu: false where `caption.backend` is `endpoint`: the server has the GPUs.
        remote: URL of a DVC remote, as s3://bucket/dvc, to which the training set is pushed; empty: none.
    """
    common = {"profile": profile, "overrides": overrides, "workdir": workdir, "code_revision": code_revision}
    weights = first(data.check_weights(**common, steps=[*DATA_STEPS]))
    made = training_set(
        **common, data_revision=data_revision, shares=shares, caption_on_gpu=caption_on_gpu, remote=remote
    ).after(weights)
    return Data(made.outputs["encode"], made.outputs["data_revision"])
