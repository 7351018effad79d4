"""Components of the three training stages: launchers on a CPU that make a TrainJob, or train here without a cluster."""

from kfp import dsl

from components.image_names import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def train_image(
    encode: dsl.Input[dsl.Dataset],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    image: str,
    tracking_uri: str,
    budget_dollars: float,
    run_id: str,
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the image stage."""
    from components.launch import Launch, launch
    from components.step import Job

    job = Job(profile, overrides, workdir, data_revision, code_revision)
    how = Launch(image, tracking_uri, budget_dollars, run_id)
    launch("train_image", [encode], job, how, checkpoint, metrics)


@dsl.component(base_image=DATA, install_kfp_package=False)
def train_video(
    encode: dsl.Input[dsl.Dataset],
    train_image: dsl.Input[dsl.Model],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    image: str,
    tracking_uri: str,
    budget_dollars: float,
    run_id: str,
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the video stage from the image stage."""
    from components.launch import Launch, launch
    from components.step import Job

    job = Job(profile, overrides, workdir, data_revision, code_revision)
    how = Launch(image, tracking_uri, budget_dollars, run_id)
    launch("train_video", [encode, train_image], job, how, checkpoint, metrics)


@dsl.component(base_image=DATA, install_kfp_package=False)
def train_highres(
    encode: dsl.Input[dsl.Dataset],
    train_video: dsl.Input[dsl.Model],
    profile: str,
    overrides: list,
    workdir: str,
    data_revision: str,
    code_revision: str,
    image: str,
    tracking_uri: str,
    budget_dollars: float,
    run_id: str,
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the high-resolution stage from the video stage."""
    from components.launch import Launch, launch
    from components.step import Job

    job = Job(profile, overrides, workdir, data_revision, code_revision)
    how = Launch(image, tracking_uri, budget_dollars, run_id)
    launch("train_highres", [encode, train_video], job, how, checkpoint, metrics)
