"""Whether a request ever fits a ClusterQueue."""

from decimal import Decimal

import pytest

from components.reasons import never_fits

pytest.importorskip("kubernetes", reason="the extra `kubeflow` is not installed")

GPU = "nvidia.com/gpu"
REQUEST = {"cpu": Decimal(704), "memory": Decimal(11200 * 2**30), GPU: Decimal(64)}


def queue(*groups: dict[str, dict[str, str]], cohort: str = "") -> dict:
    """A ClusterQueue of such groups: flavor → resource → quota."""
    made = [
        {
            "flavors": [
                {"name": flavor, "resources": [{"name": name, "nominalQuota": value} for name, value in quotas.items()]}
                for flavor, quotas in group.items()
            ]
        }
        for group in groups
    ]
    return {"spec": {"resourceGroups": made} | ({"cohortName": cohort} if cohort else {})}


H800 = {"cpu": "768", "memory": "12Ti", GPU: "64"}
SMALL = {"cpu": "256", "memory": "1Ti", GPU: "8"}


@pytest.mark.parametrize(
    "whole",
    [
        queue({"captioning": SMALL, "h800": H800}),
        queue({"h800": {"cpu": "704", "memory": "11200Gi", GPU: "64"}}),  # exactly
        queue({"h800": H800}, {"rdma": {"rdma/ib": "0"}}),  # what is not asked for
        queue({"captioning": SMALL}, cohort="team"),  # the cohort may lend the rest
    ],
)
def test_what_fits_or_may_be_lent(whole: dict) -> None:
    assert never_fits(REQUEST, whole) == ""


@pytest.mark.parametrize(
    ("whole", "lack"),
    [
        # One flavor has to hold all: GPUs of one and CPUs of the other do not add up. The nearest one is named.
        (queue({"captioning": SMALL, "h800": H800 | {"cpu": "700"}}), "704 cpu of 700 in flavor h800"),
        (queue({"h800": {GPU: "64"}}, {"h800": {"memory": "8Ti"}}), "11200 Gi memory of 8192 Gi in flavor h800"),
        (queue({"h800": {"cpu": "96k", GPU: "56"}}), "64 nvidia.com/gpu of 56 in flavor h800"),
    ],
)
def test_what_no_flavor_holds_is_named(whole: dict, lack: str) -> None:
    assert never_fits(REQUEST, whole) == lack
