"""Decide, then do: everything about a run that can be known before a weight is loaded. Nothing here imports torch."""
