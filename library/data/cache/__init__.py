"""Latents and text encoder outputs that are computed once and kept, in memory or on disk."""
