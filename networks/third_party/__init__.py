"""Network modules of other programs, run unmodified."""
