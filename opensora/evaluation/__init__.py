"""The parts of the step `evaluate`: samples, reference statistics, scores, the champion, plots."""

METRICS_VERSION = 1  # of metrics.json and scores.json; numbers of another one are not compared
