"""What doctor, pipelines and launchers ask a cluster by: names, the account; and Kubeflow Pipelines asked directly.

Is it there, and does it let the bearer of this token in?
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from opensora.config import UserError

TIMEOUT_S = 20
API = "/apis/v2beta1"
TRAINER, KUEUE = ("trainer.kubeflow.org", "v1alpha1"), ("kueue.x-k8s.io", "v1beta2")  # group and version
GPU = "nvidia.com/gpu"
TASK_QUEUE = "opensora-data"  # of the pipelines' tasks; Kueue looks at it where its integration of plain pods is on
SERVICE_ACCOUNT = "default-editor"  # of KFP in multi-user mode; its newer releases refuse others unless told
WHERE = (
    "give its address, as http://localhost:8888 behind `kubectl -n kubeflow port-forward svc/ml-pipeline 8888` "
    "(--kfp-host of the doctor, --host of `opensora pipeline`, or KFP_HOST)"
)


class KubeflowError(UserError):
    """Kubeflow Pipelines cannot be reached, or refuses; the message says why and what to do."""


def load_account() -> None:
    """Have the `kubernetes` client use the pod's account, else that of ~/.kube/config.

    Raises:
        kubernetes.config.ConfigException: there is neither.
    """
    from kubernetes import config

    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()


def read_token() -> str:
    """The token of KFP_TOKEN or of the file that KFP_TOKEN_FILE names; empty if neither is set.

    Raises:
        KubeflowError: the file cannot be read.
    """
    token, name = os.environ.get("KFP_TOKEN", ""), os.environ.get("KFP_TOKEN_FILE", "")
    if token or not name:
        return token
    try:
        return Path(name).read_text().strip()
    except OSError as error:
        raise KubeflowError(f"KFP_TOKEN_FILE names {name}, which cannot be read: {error.strerror}") from None


def greet(host: str, token: str, namespace: str = "") -> None:
    """Ask for the API's health and, where a namespace is given, for its experiments, which only its users may see.

    Raises:
        KubeflowError: nothing answers, something else does, or the token is missing or refused; for a namespace also if
            KFP knows no users.
    """
    health = _get(host, token, "/healthz")
    if namespace:
        if not health.get("multi_user"):
            raise KubeflowError(
                f"Kubeflow Pipelines at {host} runs in single-user mode, in which runs do not live in {namespace}; "
                "install it in multi-user mode"
            )
        _get(host, token, "/experiments", {"namespace": namespace, "page_size": "1"})


def _get(host: str, token: str, path: str, query: dict[str, str] | None = None) -> dict:
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = host.rstrip("/") + API + path
    try:
        answer = requests.get(address, query, headers=headers, timeout=TIMEOUT_S, allow_redirects=False)
    except (requests.RequestException, ValueError) as error:
        raise KubeflowError(f"no Kubeflow Pipelines API at {host} ({type(error).__name__}); {WHERE}") from error
    if 300 <= answer.status_code < 400 or answer.status_code in (401, 403):  # a sign-in page redirects
        what = "refuses the token of KFP_TOKEN or KFP_TOKEN_FILE" if token else "wants a token: set KFP_TOKEN"
        raise KubeflowError(f"Kubeflow Pipelines at {host} {what} (HTTP {answer.status_code})")
    if answer.status_code == 400:
        raise KubeflowError(f"Kubeflow Pipelines at {host} says: {_message(answer.text)} (HTTP 400)")
    if answer.status_code != 200 or "json" not in answer.headers.get("Content-Type", ""):
        raise KubeflowError(f"{host} is no Kubeflow Pipelines API (HTTP {answer.status_code}); {WHERE}")
    return answer.json()


def _message(text: str) -> str:
    """Of a refusal of the API, whose form is {"error", "message", "code"}; in one line."""
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    return " ".join(text.split())[:300]
