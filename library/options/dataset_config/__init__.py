"""Read dataset files of other trainers into the records of options/datasets.py. Standard library only."""
