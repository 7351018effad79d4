"""The launcher of a TrainJob against an API server over HTTP."""

from collections.abc import Iterator

import pytest

from components.trainjob import Cluster, JobError, TrainJob, run
from tests.components.fake_cluster import FakeCluster, exited, serve

pytest.importorskip("kubernetes", reason="the extra `kubeflow` is not installed")

JOB = TrainJob(
    name="train-video-1a2b",
    namespace="opensora",
    stage="train_video",
    image="registry.example/opensora-python-train@sha256:" + "0" * 64,
    args=("train_video", "--profile", "h800"),
    nodes=8,
    gpus_per_node=8,
    env={"MLFLOW_TRACKING_URI": "http://mlflow.opensora-mlflow:5000"},
    deadline_s=86400,
    owner={"name": "launcher", "uid": "1"},
)


class Story:
    """A fake cluster, the launcher's side of it, and what the launcher said."""

    def __init__(self, fake: FakeCluster, url: str) -> None:
        from kubernetes import client

        configuration = client.Configuration(host=url)
        configuration.retries = False
        self.fake, self.said = fake, []
        self.cluster = Cluster(
            "opensora", client.ApiClient(configuration), self.said.append, patience_s=0.5, sleep=lambda _: None
        )

    def run(self, *steps, stuck_s: float = 300) -> None:
        self.fake.steps = list(steps)
        run(JOB, self.cluster, stuck_s=stuck_s)


@pytest.fixture
def story() -> Iterator[Story]:
    fake = FakeCluster()
    with serve(fake) as url:
        yield Story(fake, url)


def starts(fake: FakeCluster) -> None:
    for node in range(8):
        fake.pod(node)
    fake.condition("Suspended", status="False")
    fake.log(0, "step 1/2", "step 1/2")


def ends(fake: FakeCluster) -> None:
    fake.log(0, "step 2/2")
    fake.condition("Complete", "all nodes finished")


def test_document_survives_the_trainers_own_models() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    document = JOB.document()
    assert models.TrainerV1alpha1TrainJob.from_dict(document).to_dict() == document


def test_a_job_is_made_followed_and_its_log_relayed_once(story: Story) -> None:
    story.run(starts, lambda fake: None, ends)
    assert story.fake.calls == [f"create {JOB.name}"]
    relayed = [line for line in story.said if line.startswith("step")]
    assert relayed == ["step 1/2", "step 1/2", "step 2/2"]
    assert story.said[-1].endswith("step 2/2")


def test_a_retry_follows_the_job_that_still_runs(story: Story) -> None:
    story.fake.jobs[JOB.name] = JOB.document()
    story.run(starts, lambda fake: None, ends)
    assert "delete" not in " ".join(story.fake.calls)
    assert any("following it" in line for line in story.said)


def test_a_retry_replaces_the_job_that_failed(story: Story) -> None:
    story.fake.jobs[JOB.name] = JOB.document()
    story.fake.condition("Failed", "a node failed")
    story.run(lambda fake: None, starts, ends)
    assert story.fake.calls == [f"create {JOB.name}", f"delete {JOB.name}", f"create {JOB.name}"]


def test_failure_names_the_node_that_failed_first_and_its_last_error(story: Story) -> None:
    def fails(fake: FakeCluster) -> None:
        for node in range(8):
            fake.pod(node, exited(1, second=30))
            fake.log(node, "rank 0: lost its peer")
        fake.pod(5, exited(1, second=20))
        fake.log(5, "error: rank 44: encode/shard-7.safetensors is damaged", "Traceback ends")
        fake.condition("Failed", "job node-0 failed")

    with pytest.raises(JobError, match=r"failed on node 5, exit code 1: error: rank 44: .* is damaged$"):
        story.run(starts, fails)


def test_failure_that_a_new_start_would_repeat_says_so(story: Story) -> None:
    def fails(fake: FakeCluster) -> None:
        fake.pod(1, exited(42))
        fake.log(1, "error: the loss was not finite")
        fake.condition("Failed", "FailJobSet")

    with pytest.raises(JobError, match="exit code 42; a new start would fail again: error: the loss"):
        story.run(starts, fails)


def test_preemption_waits_and_goes_on(story: Story) -> None:
    def taken(fake: FakeCluster) -> None:
        fake.pods.clear()
        fake.logs.clear()
        fake.condition("Suspended", "preempted to accommodate a higher priority workload")

    def resumes(fake: FakeCluster) -> None:
        starts(fake)
        fake.log(0, "resuming from step-00000001")

    story.run(starts, taken, resumes, ends)
    text = "\n".join(story.said)
    assert "waits in the queue (preempted" in text
    assert text.index("preempted") < text.index("resuming from") < text.index("complete")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_cancellation_deletes_the_job(story: Story, stop: type[BaseException]) -> None:
    rounds = []

    def cancelled(_: float) -> None:
        rounds.append(1)
        if len(rounds) == 2:
            raise stop(143)

    story.cluster.sleep = cancelled
    with pytest.raises(stop):
        story.run(starts)
    assert story.fake.calls[-1] == f"delete {JOB.name}"
    assert not story.fake.jobs


def test_a_lost_connection_is_waited_out(story: Story) -> None:
    def away(fake: FakeCluster) -> None:
        fake.failures = [0, 503, 429, 0]

    story.run(starts, away, ends)
    assert any("does not answer" in line for line in story.said)
    assert any("answers again" in line for line in story.said)


def test_an_api_that_stays_away_ends_the_launcher_and_not_the_job(story: Story) -> None:
    def gone(fake: FakeCluster) -> None:
        fake.failures = [503] * 100_000

    with pytest.raises(JobError, match="follows the same job"):
        story.run(starts, gone)
    assert JOB.name in story.fake.jobs


def test_a_job_larger_than_the_queue_is_refused_before_it_waits(story: Story) -> None:
    story.fake.gpus = 16
    with pytest.raises(JobError, match="64 GPUs and queue opensora has 16"):
        story.run()
    assert not story.fake.calls


def test_a_missing_secret_is_the_reason(story: Story) -> None:
    def waits(fake: FakeCluster) -> None:
        message = 'secret "object-store" not found'
        fake.pod(0, {"waiting": {"reason": "CreateContainerConfigError", "message": message}})

    with pytest.raises(JobError, match=r'CreateContainerConfigError.*secret "object-store" not found'):
        story.run(waits, stuck_s=0)
    assert not story.fake.jobs


def test_a_refusal_of_the_api_is_told(story: Story) -> None:
    story.fake.refuse = (403, "trainjobs is forbidden")
    with pytest.raises(JobError, match=r"trainjobs is forbidden \(HTTP 403\); the service account"):
        story.run()


def test_a_job_deleted_by_somebody_else_is_no_success(story: Story) -> None:
    with pytest.raises(JobError, match="was deleted while it ran"):
        story.run(starts, lambda fake: fake.jobs.clear())
