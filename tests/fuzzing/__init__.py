"""Random files for every reader."""
