"""The pod through which weights reach the volume: where the profile looks for them, by the command that is advised."""

import shlex
from pathlib import Path

import yaml

from components.step import BRING
from opensora.config import load_config
from tests.conftest import ROOT

BASE = ROOT / "k8s" / "base"


def test_weights_go_where_the_profile_looks_for_them_by_a_way_that_is_open() -> None:
    (deployment,) = yaml.safe_load_all((BASE / "weights.yaml").read_text())
    assert deployment["spec"]["replicas"] == 0
    template = deployment["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {item["name"]: item.get("persistentVolumeClaim", {}).get("claimName") for item in pod["volumes"]}
    target = load_config(ROOT / "params.yaml", "h800").weights_dir
    assert claims[mounts[str(Path(target).parent)]] == "runs"
    assert f"mkdir -p {target} &&" in container["command"][-1]

    there, _, here = BRING.format(target).removeprefix("bring them: ").partition(" | ")
    assert there == "tar cf - -C weights ."
    words = shlex.split(here)
    assert words[:7] == ["kubectl", "-n", "opensora", "exec", "-i", f"deploy/{deployment['metadata']['name']}", "--"]
    assert words[7:] == ["tar", "xf", "-", "-C", target]
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert f"{there} | {here}" in page

    policies = yaml.safe_load_all((BASE / "network-policies.yaml").read_text())
    (internet,) = (policy for policy in policies if policy["metadata"]["name"] == "internet")
    assert internet["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
