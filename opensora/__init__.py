"""Open-Sora 1.0 as a workflow: raw videos in, a promoted text-to-video model out."""
