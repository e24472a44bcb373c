"""Caches of latents and text encoder outputs, in memory or on disk."""
