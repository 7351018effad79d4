"""The gate's decision: one table, and the words of its reasons."""

import math
from dataclasses import replace

import pytest

from opensora.config import ConfigError, Gate, Primary, PromoteConfig, load_config
from opensora.promotion.gate import Candidate, Champion, Check, Evaluation, judge
from opensora.promotion.report import describe
from tests.conftest import ROOT

PROMPTS = [f"prompt {number}" for number in range(48)]
METRICS = {"metrics_version": 1, "fd_extractor": "randconv", "samples_per_stage": 48, "score": 0.8, "fd": 8.0}
SCORES = [{"follows": int(number < 38)} for number in range(48)]
NOW = Evaluation(METRICS, PROMPTS, list(range(48)), SCORES)
TAGS = {"git_commit": "c0ffee", "dvc_lock_md5": "5eed", "checkpoint.sha256": "new", "profile": "demo"}
TAGS |= {"fd_extractor": "randconv", "samples_per_stage": "48"}
GOOD = Candidate("new", TAGS, NOW, evaluated_sha256="new")
OLD = Champion("3", "old", {}, NOW, "evaluated beside the candidate")
HIGHER = Gate(metric="score", floor=0.5, tolerance=0.1)
LOWER = Gate(metric="fd", direction="lower", floor=10.0, tolerance=1.0)
GATES = PromoteConfig(gates=(HIGHER, LOWER))
BETTER = GATES.model_copy(update={"primary": Primary(score="follows")})
AS_GOOD = GATES.model_copy(update={"primary": Primary(score="follows", margin=-0.1)})
LAX = GATES.model_copy(update={"replace_lost_champion": True})
LOST = replace(OLD, evaluation=None, lost="model.safetensors is missing")


def measured(**values: object) -> Evaluation:
    """The evaluation with other metrics; None takes one out."""
    return replace(NOW, metrics={name: value for name, value in (METRICS | values).items() if value is not None})


def tagged(**values: str) -> Candidate:
    return replace(GOOD, tags={**TAGS, **values})


def candidate(**values: object) -> Candidate:
    return replace(GOOD, evaluation=measured(**values))


def champion(**values: object) -> Champion:
    return replace(OLD, evaluation=measured(**values))


def right(count: int, of: int = 48) -> Evaluation:
    """The first `count` prompts follow."""
    return replace(NOW, scores=[{"follows": int(number < count)} for number in range(of)])


def without(*names: str) -> Candidate:
    return replace(GOOD, tags={name: value for name, value in TAGS.items() if name not in names})


# What the gate is asked, what is known, and the checks that fail: kind and a word of the reason.
TABLE = {
    # a first model
    "first": (GATES, GOOD, None, {}),
    "first, a primary metric is not needed": (BETTER, GOOD, None, {}),
    "first, under a floor": (GATES, candidate(score=0.4), None, {"floor score": "0.4 < 0.5"}),
    "first, over a ceiling": (GATES, candidate(fd=10.5), None, {"floor fd": "10.5 > 10"}),
    "first, on the floor": (GATES, candidate(score=0.5, fd=10.0), None, {}),
    "first, no floor at all": (
        PromoteConfig(gates=(Gate(metric="score", tolerance=0.1),)),
        GOOD,
        None,
        {"floor": "no gate has a floor"},
    ),
    "no gates": (PromoteConfig(), GOOD, None, {"floor": "promote.gates is empty"}),
    # lineage
    "no commit": (GATES, tagged(git_commit="unknown"), None, {"lineage": "git_commit or image_digest"}),
    "an image in the place of a commit": (GATES, tagged(git_commit="unknown", image_digest="sha256:1"), None, {}),
    "no data": (GATES, without("dvc_lock_md5"), None, {"lineage": "dvc_lock_md5 or data_revision or data_fingerprint"}),
    "data by its fingerprint": (
        GATES,
        replace(without("dvc_lock_md5"), tags={**without("dvc_lock_md5").tags, "data_fingerprint": "f"}),
        None,
        {},
    ),
    "no extractor": (GATES, tagged(fd_extractor="None"), None, {"lineage": "fd_extractor"}),
    "no profile": (GATES, without("profile"), None, {"lineage": "profile"}),
    # artifact, signature, sample
    "candidate changed": (
        GATES,
        replace(GOOD, artifact_problem="another sha256"),
        None,
        {"artifact": "another sha256"},
    ),
    "no clip": (GATES, replace(GOOD, sample_problem="no mp4"), None, {"sample": "no mp4"}),
    "same signature": (GATES, tagged(signature="s"), replace(OLD, tags={"signature": "s"}), {}),
    "other signature": (GATES, tagged(signature="s"), replace(OLD, tags={"signature": "t"}), {"signature": "s, not t"}),
    "champion without a signature": (GATES, tagged(signature="s"), OLD, {}),
    # the evaluation
    "metrics of a newer program": (GATES, candidate(metrics_version=2), None, {"evaluation": "version 2"}),
    "metrics of another checkpoint": (
        GATES,
        replace(GOOD, evaluated_sha256="other"),
        None,
        {"evaluation": "of checkpoint other, the candidate is new"},
    ),
    "metric missing": (GATES, candidate(score=None), None, {"floor score": "missing"}),
    "metric missing, said why": (
        GATES,
        candidate(score=None, absent={"score": "no CLIP"}),
        None,
        {"floor score": "no CLIP"},
    ),
    "metric NaN": (GATES, candidate(score=math.nan), None, {"floor score": "nan"}),
    "metric infinite": (GATES, candidate(fd=-math.inf), None, {"floor fd": "-inf"}),
    "metric is text": (GATES, candidate(score="0.9"), None, {"floor score": "number was expected"}),
    "metric is a truth value": (GATES, candidate(score=True), None, {"floor score": "number was expected"}),
    "metric NaN beside a champion": (
        GATES,
        candidate(score=math.nan),
        OLD,
        {"floor score": "nan", "non-inferiority score": "nan"},
    ),
    "taken back": (GATES, replace(GOOD, rolled_back="eva took it back"), OLD, {"roll-back": "eva took it back"}),
    # a champion to compare with
    "as good": (GATES, GOOD, OLD, {}),
    "within the tolerance": (GATES, candidate(score=0.7, fd=9.0), OLD, {}),
    "worse": (
        GATES,
        candidate(score=0.69),
        OLD,
        {"non-inferiority score": "worse by more than 0.1 of the champion's 0.8"},
    ),
    "worse, lower is better": (GATES, candidate(fd=9.5), OLD, {"non-inferiority fd": "9.5 is worse by more than 1"}),
    "better than a champion under the floors": (GATES, GOOD, champion(score=0.1, fd=50.0), {}),
    "as good as a champion under the floors": (GATES, candidate(score=0.1), champion(score=0.1), {"floor score": "<"}),
    "the champion has no such metric": (
        GATES,
        GOOD,
        champion(score=None),
        {"non-inferiority score": "champion's score"},
    ),
    "the champion's metric is NaN": (
        GATES,
        GOOD,
        champion(fd=math.nan),
        {"non-inferiority fd": "champion's fd is nan"},
    ),
    "not compared": (PromoteConfig(gates=(Gate(metric="score", floor=0.5),)), candidate(score=0.5), OLD, {}),
    "the champion itself": (BETTER, GOOD, replace(OLD, sha256="new"), {}),
    "the champion itself under a new floor": (
        GATES,
        candidate(score=0.1),
        replace(OLD, sha256="new"),
        {"floor score": "<"},
    ),
    # another basis
    "another N": (GATES, GOOD, champion(samples_per_stage=64), {"champion": "samples_per_stage is 48 here, 64 there"}),
    "another extractor": (
        GATES,
        GOOD,
        champion(fd_extractor="i3d"),
        {"champion": "fd_extractor is randconv here, i3d"},
    ),
    "another metrics version": (
        GATES,
        GOOD,
        champion(metrics_version=None),
        {"champion": "1 here, not recorded there"},
    ),
    "other settings": (
        GATES,
        candidate(evaluation_sha256="a"),
        champion(evaluation_sha256="b"),
        {"champion": "evaluation_sha256 is a here, b there"},
    ),
    "other prompts": (
        GATES,
        GOOD,
        replace(OLD, evaluation=replace(NOW, prompts=[*PROMPTS[:-1], "a cat"])),
        {"champion": "prompts differ, first number 47: 'prompt 47' here, 'a cat' there"},
    ),
    "other seeds": (
        GATES,
        GOOD,
        replace(OLD, evaluation=replace(NOW, seeds=list(range(1, 49)))),
        {"champion": "seeds"},
    ),
    "prompts not recorded": (
        GATES,
        GOOD,
        replace(OLD, evaluation=Evaluation(METRICS)),
        {"champion": "not recorded there"},
    ),
    "neither recorded its prompts": (
        GATES,
        replace(GOOD, evaluation=Evaluation(METRICS)),
        replace(OLD, evaluation=Evaluation(METRICS)),
        {},
    ),
    "no evaluation of the champion": (GATES, GOOD, replace(OLD, evaluation=None), {"champion": "has no evaluation"}),
    # a champion that is lost
    "lost": (GATES, GOOD, LOST, {"champion": "lost: model.safetensors is missing"}),
    "lost, and that is accepted": (LAX, GOOD, LOST, {}),
    "lost and accepted, under a floor": (LAX, candidate(score=0.4), LOST, {"floor score": "<"}),
    "lost, the same checkpoint again": (GATES, GOOD, replace(LOST, sha256="new"), {"champion": "lost"}),
    "the acceptance is no free pass where nothing is lost": (
        LAX,
        candidate(score=0.6),
        OLD,
        {"non-inferiority score": "w"},
    ),
    # the primary metric, prompt by prompt: the champion follows 38 of 48
    "not better": (BETTER, GOOD, OLD, {"improvement follows": "not above 0; better on 0, worse on 0 of 48"}),
    "better": (BETTER, replace(GOOD, evaluation=right(46)), OLD, {}),
    "better by chance": (BETTER, replace(GOOD, evaluation=right(41)), OLD, {"improvement follows": "better on 3"}),
    "worse on the primary": (BETTER, replace(GOOD, evaluation=right(30)), OLD, {"improvement follows": "worse on 8"}),
    "as good is enough with a margin": (AS_GOOD, GOOD, OLD, {}),
    "a little worse is accepted": (AS_GOOD, replace(GOOD, evaluation=right(37)), OLD, {}),
    "too much worse": (AS_GOOD, replace(GOOD, evaluation=right(34)), OLD, {"improvement follows": "not above -0.1"}),
    "lower is better": (
        GATES.model_copy(update={"primary": Primary(score="follows", direction="lower")}),
        replace(GOOD, evaluation=right(30)),
        OLD,
        {},
    ),
    "no scores": (
        BETTER,
        replace(GOOD, evaluation=replace(NOW, scores=None)),
        OLD,
        {"improvement follows": "no scores"},
    ),
    "no scores of the champion": (
        BETTER,
        GOOD,
        replace(OLD, evaluation=replace(NOW, scores=None)),
        {"improvement follows": "the champion: no scores by prompt"},
    ),
    "a score that is NaN": (
        BETTER,
        replace(GOOD, evaluation=replace(NOW, scores=[*SCORES[:-1], {"follows": math.nan}])),
        OLD,
        {"improvement follows": "1 of 48 prompts (number 47)"},
    ),
    "another number of scores": (
        BETTER,
        replace(GOOD, evaluation=right(38, of=47)),
        OLD,
        {"improvement follows": "47 prompts of the candidate, 48 of the champion"},
    ),
}
FIRST_FIVE = ["lineage", "artifact", "signature", "sample", "evaluation", "roll-back", "champion"]


@pytest.mark.parametrize(("config", "new", "old", "expected"), TABLE.values(), ids=TABLE)
def test_decision(config: PromoteConfig, new: Candidate, old: Champion | None, expected: dict[str, str]) -> None:
    checks = judge(config, new, old)
    failed = {f"{check.kind} {check.metric}".strip(): check.reason for check in checks if not check.passed}
    if "champion" in failed:  # then each comparison says that there was none
        for name in [name for name in failed if name.startswith(("non-inferiority", "improvement"))]:
            assert failed.pop(name) == "no champion to compare with"
    assert failed.keys() == expected.keys()
    for name, words in expected.items():
        assert words in failed[name]
    assert [check.kind for check in checks[:7]] == FIRST_FIVE  # all of them, whatever failed
    assert all(check.reason for check in checks)


def reasons(checks: list[Check]) -> dict[str, str]:
    return {check.kind: check.reason for check in checks}


def test_what_was_not_compared_is_said() -> None:
    assert "no champion yet: the floors alone decide" in reasons(judge(BETTER, GOOD, None))["champion"]
    assert "the floors alone decide" in reasons(judge(LAX, GOOD, LOST))["champion"]
    assert "the champion already" in reasons(judge(GATES, GOOD, replace(OLD, sha256="new")))["champion"]
    old_form = replace(GOOD, evaluation=measured(metrics_version=None), evaluated_sha256="")
    assert "does not say of which checkpoint" in reasons(judge(GATES, old_form, None))["evaluation"]


def test_the_report_names_every_check() -> None:
    checks = judge(BETTER, candidate(score=0.69), OLD)
    verdict = {"model": "m", "verdict": "rejected", "version": None, "alias": None, "champion": "3", "notes": []}
    text = describe(verdict | {"checks": [vars(check) for check in checks], "checkpoint": "c", "sha256": "s"})
    assert "# m: rejected" in text
    assert "version 3 stays the champion" in text
    assert all(check.reason in text for check in checks)
    assert text.count("**failed**") == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("promote.gates=[{metric: a}]", "neither a floor nor a tolerance"),
        ("promote.gates=[{metric: a, floor: 1}, {metric: a, floor: 2}]", "names a more than once"),
        ("promote.gates=[{metric: a, floor: .nan}]", "finite"),
        ("promote.gates=[{metric: a, tolerance: -1}]", "greater than or equal to 0"),
        ("promote.primary={score: a, margin: .inf}", "finite"),
    ],
)
def test_a_gate_that_says_nothing_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "params.yaml", "demo", (override,))
