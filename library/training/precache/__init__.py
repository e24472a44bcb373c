"""Caches that are filled before a training: plan, command, work."""
