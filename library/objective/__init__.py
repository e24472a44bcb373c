"""What is minimised: forward process, timesteps, noise, weights, losses. Pure maths; knows no family and no dataset."""
