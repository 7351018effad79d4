"""Engines: how one training step runs on one device or many."""
