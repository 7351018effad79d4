"""Runs, checkpoints and the model registry in MLflow; nothing else of this project imports it."""
