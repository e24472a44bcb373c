"""What happens block by block: recomputed activations, weights in main memory, compiled code."""
