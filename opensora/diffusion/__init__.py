"""Noise processes: how a model is trained on noised latents and how latents are sampled from it."""
