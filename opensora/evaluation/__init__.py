"""The parts of the step `evaluate`: samples, reference statistics, scores, the champion, plots."""
