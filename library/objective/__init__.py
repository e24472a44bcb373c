"""The training objective: forward process, timesteps, noise, loss weights, losses. Pure maths, independent of families
and datasets."""
