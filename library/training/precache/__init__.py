"""Encode latents or captions to disk before training: plan, command, work."""
