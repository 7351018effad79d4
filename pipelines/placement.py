"""Where the tasks of a pipeline run on a cluster, and with what. The local runner ignores all of it."""

from kfp import dsl, kubernetes

from opensora.kubeflow import GPU, TASK_QUEUE

CLAIM, MOUNT = "runs", "/runs"  # k8s/base/storage.yaml
SECRET_KEYS = {
    name: name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
}
MLFLOW_KEYS = {name: name for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
RETRIES = 2
# Argo counts it from the start of the first try, starts none after it and ends the last one at it: so it is longer than
# any task takes. KFP's own default is an hour.
RETRY_FOR = "30d"


def on_cpu(task: dsl.PipelineTask, cpu: str = "4", memory: str = "16Gi") -> dsl.PipelineTask:
    """A task of the CPU pool."""
    return _with_retries(_placed(task, "cpu", cpu, memory))


def first(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """The task that everything waits for: a look at this moment, so neither from the cache nor a second time."""
    return _placed(task, "cpu", "1", "2Gi").set_caching_options(False)


def on_gpu(task: dsl.PipelineTask, gpus: int = 1, cpu: str = "12", memory: str = "96Gi") -> dsl.PipelineTask:
    """A task of the captioning pool, with GPUs of one node; what it has in /dev/shm counts as its memory."""
    _with_retries(_placed(task, "captioning", cpu, memory))
    task.set_accelerator_type(GPU).set_accelerator_limit(gpus)
    kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    shm = f"{16 * gpus}Gi"
    kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=shm)
    return task


def with_internet(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """The network policy `internet` lets tasks with this label out, to public addresses."""
    return kubernetes.add_pod_label(task, "opensora/internet", "true")


def as_launcher(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A small task that talks to the cluster's API; it knows its own pod, which owns the job that it makes."""
    on_cpu(task, cpu="1", memory="4Gi")
    kubernetes.use_field_path_as_env(task, env_name="POD_NAME", field_path="metadata.name")
    kubernetes.use_field_path_as_env(task, env_name="POD_UID", field_path="metadata.uid")
    return task


def _with_retries(task: dsl.PipelineTask) -> dsl.PipelineTask:
    return task.set_retry(
        num_retries=RETRIES, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=RETRY_FOR
    )


def _placed(task: dsl.PipelineTask, pool: str, cpu: str, memory: str) -> dsl.PipelineTask:
    task.set_cpu_limit(cpu).set_memory_limit(memory)  # requests are then the same; each call costs KFP 15 ms
    task.set_env_variable("HOME", "/tmp")
    kubernetes.add_node_selector(task, "opensora/pool", pool)
    kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", TASK_QUEUE)
    kubernetes.mount_pvc(task, pvc_name=CLAIM, mount_path=MOUNT)
    kubernetes.use_secret_as_env(task, secret_name="object-store", secret_key_to_env=SECRET_KEYS, optional=True)
    kubernetes.use_secret_as_env(task, secret_name="mlflow", secret_key_to_env=MLFLOW_KEYS, optional=True)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    return task
