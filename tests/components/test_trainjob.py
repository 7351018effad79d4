"""The launcher of a TrainJob against an API server over HTTP."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from components.cluster import RUN, Cluster, JobError
from components.reasons import FinalError
from components.trainjob import TrainJob, run
from tests.components.fake_cluster import GPU, FakeCluster, exited, serve

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
    run_id="run-1",
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

    def run(self, *steps, stuck_s: float = 600, going_s: float = 900) -> None:
        self.fake.steps = list(steps)
        run(JOB, self.cluster, stuck_s=stuck_s, going_s=going_s)

    def earlier(self, **metadata) -> None:
        """The job of an earlier try is there."""
        self.fake.jobs[JOB.name] = JOB.document()
        self.fake.jobs[JOB.name]["metadata"] |= metadata


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
    assert document["metadata"]["labels"][RUN] == "run-1"


def test_a_job_is_made_followed_and_its_log_relayed_once(story: Story) -> None:
    story.run(starts, lambda fake: None, ends)
    assert story.fake.calls == [f"create {JOB.name}"]
    relayed = [line for line in story.said if line.startswith("step")]
    assert relayed == ["step 1/2", "step 1/2", "step 2/2"]
    assert story.said[-1].endswith("step 2/2")


def test_a_retry_follows_the_job_that_still_runs_and_owns_it(story: Story) -> None:
    story.earlier(ownerReferences=[{"apiVersion": "v1", "kind": "Pod", "name": "before", "uid": "0"}])
    story.run(starts, lambda fake: None, ends)
    assert story.fake.calls == [f"create {JOB.name}", f"patch {JOB.name}"]
    assert story.fake.jobs[JOB.name]["metadata"]["ownerReferences"] == JOB.owners()
    assert any("following it" in line for line in story.said)


def test_a_job_that_may_not_be_taken_over_is_followed_all_the_same(story: Story) -> None:
    def no_right(fake: FakeCluster) -> None:
        fake.refuse = (403, "patch is forbidden")

    story.earlier(ownerReferences=[])
    story.run(no_right, starts, ends)
    assert any("cannot be taken over: patch is forbidden" in line for line in story.said)
    assert story.said[-1].endswith("step 2/2")


def test_a_retry_replaces_the_job_that_failed(story: Story) -> None:
    story.earlier()
    story.fake.condition("Failed", "a node failed")
    story.run(lambda fake: None, starts, ends)
    assert story.fake.calls == [f"create {JOB.name}", f"delete {JOB.name}", f"create {JOB.name}"]


@pytest.mark.parametrize("code", [2, 42])
def test_a_retry_does_not_repeat_what_would_fail_again(story: Story, code: int) -> None:
    story.earlier()
    story.fake.pod(0, exited(1, second=1))
    story.fake.pod(3, exited(code, second=2))
    story.fake.log(3, "error: train_video.lr must be above 0")
    story.fake.condition("Failed", "FailJobSet")
    with pytest.raises(
        FinalError, match=f"node 3, exit code {code}; a new start would fail again: error: train_video.lr must"
    ):
        story.run()
    assert story.fake.calls == [f"create {JOB.name}"]


@pytest.mark.parametrize(
    ("reason", "said"),
    [("FailJobSetFailurePolicyAction", "a new start would fail again: first failed"), ("DeadlineExceeded", "budget")],
)
def test_a_retry_believes_the_job_whose_pods_are_gone(story: Story, reason: str, said: str) -> None:
    story.earlier()
    story.fake.condition("Failed", "first failed job: node-0")
    story.fake.jobs[JOB.name]["status"]["conditions"][0]["reason"] = reason
    with pytest.raises(FinalError, match=said):
        story.run()
    assert story.fake.calls == [f"create {JOB.name}"]


def test_a_retry_waits_until_the_job_before_is_gone(story: Story) -> None:
    story.earlier(deletionTimestamp="2026-01-01T00:00:00Z")
    story.run(lambda fake: None, lambda fake: fake.jobs.clear(), starts, ends)
    assert story.said[0] == f"waiting for TrainJob {JOB.name} of an earlier try to be gone, with its pods"
    assert "delete" not in " ".join(story.fake.calls)


def test_a_job_that_does_not_go_is_not_waited_for_without_end(story: Story) -> None:
    story.earlier(deletionTimestamp="2026-01-01T00:00:00Z", finalizers=["foregroundDeletion"])
    story.fake.pod(0)
    with pytest.raises(JobError, match="not gone after 0 s: foregroundDeletion holds it, and 1 of its pods are there"):
        story.run(going_s=0)


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
    assert "waits in the queue: preempted" in text
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

    with pytest.raises(JobError, match="a job that runs goes on"):
        story.run(starts, gone)
    assert JOB.name in story.fake.jobs


@pytest.mark.parametrize(
    ("name", "quota", "lack"),
    [
        (GPU, "16", "64 nvidia.com/gpu of 16 in flavor h800"),
        ("cpu", "703", "704 cpu of 703 in flavor h800"),
        ("memory", "11000Gi", "11200 Gi memory of 11000 Gi in flavor h800"),
    ],
)
def test_a_job_larger_than_the_queue_is_refused_before_it_waits(story: Story, name: str, quota: str, lack: str) -> None:
    story.fake.quota[name] = quota
    with pytest.raises(JobError, match=f"never fits queue opensora: 8 nodes ask for {lack};"):
        story.run()
    assert not story.fake.calls


def test_waiting_in_the_queue_says_why_each_reason_once_and_has_no_limit(story: Story) -> None:
    def waits(message: str):
        def step(fake: FakeCluster) -> None:
            fake.condition("Suspended", "TrainJob is suspended")
            fake.workload["QuotaReserved"] = message

        return step

    first, second = "insufficient unused quota for nvidia.com/gpu, 8 more needed", "LocalQueue opensora is inactive"
    story.run(waits(first), waits(first), waits(second), waits(second), starts, ends, stuck_s=0)
    reasons = [line.partition("queue: ")[2] for line in story.said if "waits in the queue" in line]
    assert reasons == [first, second]


def unplaced(fake: FakeCluster) -> None:
    fake.condition("Suspended", status="False")
    for node in range(8):
        fake.unplaced(node, "0/8 nodes are available:\n8 Insufficient nvidia.com/gpu.")


def not_made(fake: FakeCluster) -> None:
    fake.condition("Suspended", status="False")
    fake.warn(f"{JOB.name}-node-0", "FailedCreate", 'Error creating: violates PodSecurity "baseline"')


def uncovered(fake: FakeCluster) -> None:
    fake.condition("Suspended", "TrainJob is suspended")
    fake.workload["QuotaReserved"] = "resource rdma/ib unavailable in ClusterQueue"


def secret(fake: FakeCluster) -> None:
    fake.pod(0, {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "object-store" not found'}})


@pytest.mark.parametrize(
    ("waits", "reason"),
    [
        (unplaced, "a pod finds no place: 0/8 nodes are available: 8 Insufficient nvidia.com/gpu."),
        (not_made, 'its pods cannot be made: FailedCreate: Error creating: violates PodSecurity "baseline"'),
        (uncovered, "it waits in the queue: resource rdma/ib unavailable in ClusterQueue"),
        (secret, 'CreateContainerConfigError in pod job-node-0-0: secret "object-store" not found'),
    ],
)
def test_what_does_not_come_by_itself_is_the_reason_after_a_while(story: Story, waits, reason: str) -> None:
    story.run(waits, starts, ends)
    assert [line for line in story.said if line.endswith(reason)] == [f"TrainJob {JOB.name}: {reason}"]

    story.fake.jobs.clear()
    story.fake.pods.clear()
    with pytest.raises(JobError) as error:
        story.run(waits, stuck_s=0)
    assert str(error.value) == f"TrainJob {JOB.name} cannot start: {reason}"
    assert not story.fake.jobs


@pytest.mark.parametrize(("job_age_s", "age_s"), [(30, 60), (7200, 3600)])
def test_a_warning_of_a_job_before_or_of_another_time_is_no_reason(story: Story, job_age_s: int, age_s: int) -> None:
    def old(fake: FakeCluster) -> None:
        fake.condition("Suspended", status="False")
        fake.warn(f"{JOB.name}-node-0", "FailedCreate", "Error creating: exceeded quota", age_s)

    story.fake.created = datetime.now(UTC) - timedelta(seconds=job_age_s)
    story.run(old, lambda fake: None, starts, ends, stuck_s=0)
    assert "exceeded quota" not in "\n".join(story.said)


def test_how_the_try_before_ended_is_no_reason_for_pods_that_are_still_going(story: Story) -> None:
    def restarts(fake: FakeCluster) -> None:
        fake.condition("Suspended", status="False")
        fake.warn(f"{JOB.name}-node-0", "BackoffLimitExceeded", "Job has reached the specified backoff limit")

    story.run(restarts, lambda fake: None, starts, ends, stuck_s=0)
    assert "cannot be made" not in "\n".join(story.said)


def test_a_refusal_of_the_api_is_told(story: Story) -> None:
    story.fake.refuse = (403, "trainjobs is forbidden")
    with pytest.raises(JobError, match=r"trainjobs is forbidden \(HTTP 403\); the service account"):
        story.run()


def test_a_job_deleted_by_somebody_else_is_no_success(story: Story) -> None:
    with pytest.raises(JobError, match="was deleted while it ran"):
        story.run(starts, lambda fake: fake.jobs.clear())
