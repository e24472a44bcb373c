"""Dataset files of other trainers, read to the records of options/datasets.py. Standard library only."""
