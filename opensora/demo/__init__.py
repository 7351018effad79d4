"""The embedded world: videos, captions and tiny models for a machine without data, weights or network."""
