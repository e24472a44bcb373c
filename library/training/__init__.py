"""A training run: optimizer, schedule, memory, loop, saving. The top layer: it imports all others."""
