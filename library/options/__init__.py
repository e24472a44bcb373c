"""Frozen, typed and checked options from command line and files. Standard library only, so that --help is instant."""
