"""The parts of the step `evaluate`: samples, reference statistics, scores, the champion, plots."""

METRICS_VERSION = 3  # of metrics.json and scores.json; numbers of another one are not compared
# Entries of metrics.json. Numbers of two models for which one of these differs, or is not there, are not compared; the
# last one stands for prompts, seeds, settings and real clips.
COMPARABLE = (
    *("metrics_version", "shape", "samples_per_stage", "fd_extractor", "extractors", "distances"),
    "evaluation_sha256",
)
