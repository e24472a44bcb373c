"""Everything that is decided about a run before any weights are loaded. Nothing here imports torch."""
