"""Averages of the weights: what a moving average is, and which files, images and validation losses use it."""
