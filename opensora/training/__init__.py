"""Training: the loop, its stages, checkpoints, and what it reports."""
