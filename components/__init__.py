"""Kubeflow components: one a step, and what they need of a cluster."""
