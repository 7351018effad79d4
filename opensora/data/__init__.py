"""Data preparation: from raw videos to latents that training reads."""
