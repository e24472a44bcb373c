"""The page of `tools/watch.py`: a small server that follows the records of runs, and the page that it serves."""
