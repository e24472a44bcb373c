"""Model files: read a header, load lazily, convert names, write whole or not at all. Needs torch only."""
