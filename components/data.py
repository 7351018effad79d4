"""Components of the data steps: raw videos in, latents and text embeddings out.

The steps that work shard by shard also come as shares, which a loop runs side by side; see `components.step.run_share`.
"""

from kfp import dsl

from components.image_names import CAPTION, DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def check_weights(profile: str, overrides: list, workdir: str, code_revision: str, steps: list) -> None:
    """Look for the weights that the steps will read: nothing is fetched or trained for a run that would lack some."""
    from components.step import Job, look_for_weights

    look_for_weights(steps, Job(profile, overrides, workdir, "", code_revision))


@dsl.component(base_image=DATA, install_kfp_package=False)
def restore(
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    remote: str,
    manifest: dsl.Output[dsl.Dataset],
) -> str:
    """Find a finished training set in the workdir, or fetch it by its DVC revision; returns the revision."""
    from components.step import Job, restore_step

    job = Job(profile, overrides, workdir, data_revision, code_revision)
    return restore_step("encode", manifest, job, remote)


@dsl.component(base_image=DATA, install_kfp_package=False)
def version(encode: dsl.Input[dsl.Dataset], remote: str) -> str:
    """Push the training set to the DVC remote; its revision names the data from here on. No remote: its fingerprint."""
    from components.step import version_step

    return version_step(encode, remote)


@dsl.component(base_image=DATA, install_kfp_package=False)
def list_shares(count: int) -> list:
    """Names of the shares that a loop runs: "0/3", "1/3", "2/3"."""
    return [f"{index}/{max(count, 1)}" for index in range(max(count, 1))]


def _share(
    before: dsl.Input[dsl.Dataset],
    models: dsl.Input[dsl.Dataset],
    step: str,
    share: str,
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
) -> None:
    """Every n-th shard of a data step. It leaves shards in the workdir; both revisions are for KFP's cache."""
    from components.step import Job, run_share

    run_share(step, [before, models], share, Job(profile, overrides, workdir, data_revision, code_revision))


data_share = dsl.component(_share, base_image=DATA, install_kfp_package=False)
gpu_share = dsl.component(_share, base_image=CAPTION, install_kfp_package=False)


@dsl.component(base_image=DATA, install_kfp_package=False)
def demo_videos(
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Render the embedded world: videos of coloured shapes that move."""
    from components.step import Job, run

    run("demo_videos", [], manifest, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=DATA, install_kfp_package=False)
def download(
    demo_videos: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Fetch videos and check that they decode."""
    from components.step import Job, run

    run("download", [demo_videos], manifest, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=DATA, install_kfp_package=False)
def split(
    download: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Find shots and write them as normalised clips into tar shards."""
    from components.step import Job, run

    run("split", [download], manifest, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=DATA, install_kfp_package=False)
def score(
    split: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Score every clip, then drop by thresholds; the reason is recorded."""
    from components.step import Job, run

    run("score", [split], manifest, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=DATA, install_kfp_package=False)
def demo_models(
    score: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Train the tiny VAE and LLaVA and make the tiny T5 of the embedded world."""
    from components.step import Job, run

    run("demo_models", [score], manifest, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=CAPTION, install_kfp_package=False)
def caption(
    score: dsl.Input[dsl.Dataset],
    demo_models: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Caption clips with LLaVA, or by a server that runs it."""
    from components.step import Job, run

    run("caption", [score, demo_models], manifest, Job(profile, overrides, workdir, data_revision, code_revision))


@dsl.component(base_image=CAPTION, install_kfp_package=False)
def encode(
    caption: dsl.Input[dsl.Dataset],
    demo_models: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Write VAE latents of all frames and text embeddings into shards."""
    from components.step import Job, run

    run("encode", [caption, demo_models], manifest, Job(profile, overrides, workdir, data_revision, code_revision))
