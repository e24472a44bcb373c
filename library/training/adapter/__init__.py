"""The adapter of a run: its plan, its creation, the metadata of its file."""
