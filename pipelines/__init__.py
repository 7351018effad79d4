"""Kubeflow pipelines: data, training, release, and all of them as one."""
