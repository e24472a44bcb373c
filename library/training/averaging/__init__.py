"""Averages of the weights: what they are, and which files, images and validation losses use them."""
