"""The gate's decision: one table, and the words of its reasons."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from opensora.config import ConfigError, Gate, Primary, PromoteConfig, load_config
from opensora.evaluation import COMPARABLE, METRICS_VERSION
from opensora.metrics.suite import MOTION
from opensora.metrics.vbench import MEASURES
from opensora.promotion.gate import Candidate, Champion, Check, Evaluation, judge
from opensora.promotion.report import describe
from tests.conftest import ROOT

PROMPTS = [f"prompt {number}" for number in range(48)]
DISTANCES = {"fd": {"extractor": "randconv", "n": 48}}
MODELS = {"vae": "v", "text_encoder": "t"}
METRICS = {"metrics_version": METRICS_VERSION, "fd_extractor": "randconv", "samples_per_stage": 48}
METRICS |= {
    "shape": "4x32x32, interval 1",
    "extractors": "randconv",
    "distances": DISTANCES,
    "evaluation_sha256": "e",
    "models_sha256": MODELS,
}
METRICS |= {"score": 0.8, "fd": 8.0}
SCORES = [{"follows": int(number < 38)} for number in range(48)]
NOW = Evaluation(METRICS, PROMPTS, list(range(48)), SCORES)
TAGS = {"git_commit": "c0ffee", "dvc_lock_md5": "5eed", "checkpoint.sha256": "new", "profile": "demo"}
TAGS |= {"fd_extractor": "randconv", "samples_per_stage": "48", "stage": "train_highres", "signature": "s"}
GOOD = Candidate("new", TAGS, NOW, models_sha256=MODELS, evaluated_sha256="new")
OLD = Champion("3", "old", {"signature": "s"}, NOW, "evaluated beside the candidate")
HIGHER = Gate(metric="score", floor=0.5, tolerance=0.1)
LOWER = Gate(metric="fd", direction="lower", floor=10.0, tolerance=1.0)
GATES = PromoteConfig(gates=(HIGHER, LOWER))
BETTER = GATES.model_copy(update={"primary": Primary(score="follows")})
AS_GOOD = GATES.model_copy(update={"primary": Primary(score="follows", margin=-0.1)})
LAX = GATES.model_copy(update={"replace_lost_champion": True})
SHORT = "2x32x32, interval 1"
ANY_SHAPE = BETTER.model_copy(update={"accept_other_shape": True})
NO_FLOOR = PromoteConfig(gates=(Gate(metric="score", tolerance=0.1),))
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
        NO_FLOOR,
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
    "trained by a program that did not write it down": (
        GATES,
        without("git_commit", "dvc_lock_md5"),
        None,
        {"lineage": "remove the folder of train_highres and train it anew"},
    ),
    # artifact, signature, sample
    "another VAE": (
        GATES,
        replace(GOOD, models_sha256=MODELS | {"vae": "w"}),
        OLD,
        {"artifact": "vae has sha256 w and had v when it was evaluated"},
    ),
    "registered with another VAE": (
        GATES,
        replace(GOOD, registered_models=MODELS | {"vae": "w"}),
        OLD,
        {"artifact": "vae has sha256 v and had w when this checkpoint was registered"},
    ),
    "registered with the same": (GATES, replace(GOOD, registered_models=MODELS), OLD, {}),
    "VAE and text encoder not recorded": (
        GATES,
        candidate(models_sha256=None),
        None,
        {"artifact": "does not say which VAE and text encoder"},
    ),
    "no text encoder recorded": (
        GATES,
        candidate(models_sha256={"vae": "v"}),
        None,
        {"artifact": "text_encoder has sha256 t and had None"},
    ),
    "candidate changed": (
        GATES,
        replace(GOOD, artifact_problem="another sha256"),
        None,
        {"artifact": "another sha256"},
    ),
    "no clip": (GATES, replace(GOOD, sample_problem="no mp4"), None, {"sample": "no mp4"}),
    "other signature": (GATES, GOOD, replace(OLD, tags={"signature": "t"}), {"signature": "s, not t"}),
    "champion without a signature": (GATES, GOOD, replace(OLD, tags={}), {"signature": "version 3, the champion, has"}),
    "candidate without a signature": (GATES, without("signature"), OLD, {"signature": "the candidate has none"}),
    "signature lost with the champion": (LAX, GOOD, replace(LOST, tags={}), {}),
    "other signature than the lost champion's": (
        LAX,
        GOOD,
        replace(LOST, tags={"signature": "t"}),
        {"signature": "s, not t"},
    ),
    # the evaluation
    "metrics of a newer program": (GATES, candidate(metrics_version=99), None, {"evaluation": "version 99"}),
    "metrics of no version": (GATES, candidate(metrics_version=None), None, {"evaluation": "of no version"}),
    "metrics of no checkpoint": (
        GATES,
        replace(GOOD, evaluated_sha256=""),
        None,
        {"evaluation": "does not say of which checkpoint it is"},
    ),
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
        {"champion": f"{METRICS_VERSION} here, not recorded there"},
    ),
    "other settings": (
        GATES,
        candidate(evaluation_sha256="a"),
        champion(evaluation_sha256="b"),
        {"champion": "evaluation_sha256 is a here, b there"},
    ),
    "a distance to another number of real clips": (
        GATES,
        GOOD,
        champion(distances={"fd": DISTANCES["fd"] | {"n": 47}}),
        {"champion": "distances.fd.n is 48 here, 47 there"},
    ),
    "a distance that the champion has not": (
        GATES,
        GOOD,
        champion(distances={}),
        {"champion": "here, not recorded there"},
    ),
    **{
        f"neither recorded {name}": (GATES, candidate(**{name: None}), champion(**{name: None}), {"champion": name})
        for name in COMPARABLE
        if name != "metrics_version"  # without which the evaluation is refused, too
    },
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
        {"champion": "prompts is not recorded here, not recorded there"},
    ),
    "no evaluation of the champion": (GATES, GOOD, replace(OLD, evaluation=None), {"champion": "has no evaluation"}),
    # a champion of another shape, from whose clips nothing can be compared
    "another shape": (
        GATES,
        GOOD,
        champion(shape=SHORT, distances={}, evaluation_sha256="of 2 frames"),
        {"champion": "are 4x32x32, interval 1, those of version 3, evaluated beside the candidate, are 2x32x32"},
    ),
    "another shape, and that is accepted": (ANY_SHAPE, GOOD, champion(shape=SHORT, evaluation_sha256="b"), {}),
    "another shape, accepted, under a floor": (
        ANY_SHAPE,
        candidate(score=0.4),
        champion(shape=SHORT),
        {"floor score": "0.4 < 0.5"},
    ),
    "another shape, accepted, no floor at all": (
        NO_FLOOR.model_copy(update={"accept_other_shape": True}),
        GOOD,
        champion(shape=SHORT),
        {"floor": "no gate has a floor"},
    ),
    "that acceptance is no free pass where the shapes are equal": (
        ANY_SHAPE,
        candidate(score=0.6),
        OLD,
        {"non-inferiority score": "worse", "improvement follows": "not above 0"},
    ),
    "nor where the champion is lost": (ANY_SHAPE, GOOD, LOST, {"champion": "lost"}),
    # a champion that is lost
    "lost": (GATES, GOOD, LOST, {"champion": "lost: model.safetensors is missing"}),
    "lost, and that is accepted": (LAX, GOOD, LOST, {}),
    "lost and accepted, under a floor": (LAX, candidate(score=0.4), LOST, {"floor score": "<"}),
    "lost and accepted, no floor at all": (
        NO_FLOOR.model_copy(update={"replace_lost_champion": True}),
        candidate(score=-99),
        LOST,
        {"floor": "no gate has a floor"},
    ),
    "the champion itself, no floor at all": (NO_FLOOR, GOOD, replace(OLD, sha256="new"), {}),
    "a champion to compare with, no floor at all": (NO_FLOOR, GOOD, OLD, {}),
    "lost, the same checkpoint again": (GATES, GOOD, replace(LOST, sha256="new"), {"champion": "lost"}),
    "the acceptance is no free pass where nothing is lost": (
        LAX,
        candidate(score=0.6),
        OLD,
        {"non-inferiority score": "w"},
    ),
    # a video in which nothing moves, as good as a champion that does not move either
    **{
        f"frozen, {profile}": (
            load_config(ROOT / "params.yaml", profile).promote,
            candidate(train_highres_flicker=1.0, train_highres_flow_degree=0.0),
            champion(train_highres_flicker=1.0, train_highres_flow_degree=0.0),
            {"floor train_highres_flow_degree": "0 < 0.002"},
        )
        for profile in ("smoke", "single_gpu", "h800")
    },
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
    other_shape = champion(shape=SHORT)
    refused, accepted = (reasons(judge(config, GOOD, other_shape))["champion"] for config in (BETTER, ANY_SHAPE))
    assert "--accept-other-shape" in refused
    assert "opensora evaluate" not in refused  # which would change nothing
    assert "by promote.accept_other_shape the floors alone decide" in accepted
    assert "the champion already" in reasons(judge(GATES, GOOD, replace(OLD, sha256="new")))["champion"]
    dirty = reasons(judge(GATES, tagged(git_dirty="true"), None))
    assert dirty["lineage"] == "git_commit c0ffee with uncommitted changes, dvc_lock_md5 5eed"


def test_the_report_names_every_check() -> None:
    checks = judge(BETTER, candidate(score=0.69), OLD)
    verdict = {"model": "m", "verdict": "rejected", "version": None, "alias": None, "champion": "3", "notes": []}
    text = describe(verdict | {"checks": [vars(check) for check in checks], "checkpoint": "c", "sha256": "s"})
    assert "# m: rejected" in text
    assert "version 3 stays the champion" in text
    assert all(check.reason in text for check in checks)
    assert text.count("**failed**") == 2


FLICKER = "{metric: train_highres_flicker, floor: 0.8}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("promote.gates=[{metric: a}]", "neither a floor nor a tolerance"),
        ("promote.gates=[{metric: a, floor: 1}, {metric: a, floor: 2}]", "names a more than once"),
        ("promote.gates=[{metric: a, floor: .nan}]", "finite"),
        ("promote.gates=[{metric: a, tolerance: -1}]", "greater than or equal to 0"),
        ("promote.primary={score: a, margin: .inf}", "finite"),
        ("promote.gates=[{metric: image_stage_accuracy, floor: 0.9, tolerance: 0.1}]", "null as its tolerance"),
        ("promote.gates=[{metric: train_video_flow_degree, tolerance: 0.1}]", "compares train_video_flow_degree"),
        ("promote.gates=[{metric: train_highres_flicker, floor: 0.8}]", "floor above 0 on train_highres_flow_degree"),
        ("promote.gates=[{metric: train_highres_clip_temporal_consistency, tolerance: 1}]", "nothing moves"),
        ("promote.gates=[{metric: train_highres_vbench_subject_consistency, floor: 1}]", "nothing moves"),
        ("promote.primary={score: motion_smoothness}", "perfect in motion_smoothness"),
        (f"promote.gates=[{FLICKER}, {{metric: train_highres_flow_degree, floor: 0.0}}]", "floor above 0"),
        (f"promote.gates=[{FLICKER}, {{metric: train_highres_flow_degree, tolerance: 0.1}}]", "floor above 0"),
        (f"promote.gates=[{FLICKER}, {{metric: train_video_flow_degree, floor: 0.1}}]", "floor above 0"),
        ("promote.gates=[{metric: train_highres_flow_degree, direction: lower, floor: 0.1}]", "perfect in"),
        ("promote.primary={score: dynamic_degree, direction: lower}", "perfect in dynamic_degree"),
    ],
)
def test_a_gate_that_says_nothing_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "params.yaml", "demo", (override,))


def test_what_a_frozen_video_is_perfect_in_is_known() -> None:
    """Of all that is measured of frames: names in scores.json and VBench's."""
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    measures = MOTION | {name: partial(call, fps=8) for name, (_, call) in MEASURES.items()}
    frozen = {name: round(call(frames[[0] * 8]), 3) for name, call in measures.items()}
    assert set(frozen.values()) == {0, 1}
    for name, value in frozen.items():
        gate = Gate(metric=name, direction="higher" if value else "lower", floor=0.5)
        with pytest.raises(ValueError, match=f"nothing moves, which is perfect in {gate.metric};"):
            PromoteConfig(gates=(gate,))


def test_flicker_is_a_gate_beside_motion() -> None:
    for motion in ("flow_degree", "dynamic_degree", "vbench_dynamic_degree"):
        gates = f"promote.gates=[{FLICKER}, {{metric: train_highres_{motion}, floor: 0.01}}]"
        config = load_config(ROOT / "params.yaml", "demo", (gates, "promote.primary={score: flicker}"))
        assert len(config.promote.gates) == 2
