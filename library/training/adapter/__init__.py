"""The adapter of a run: its plan, its creation and the metadata of its file."""
