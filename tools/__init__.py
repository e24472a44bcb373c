"""Command-line programs besides training. Each parses its options, calls the library and returns an exit code."""
