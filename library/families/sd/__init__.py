"""The Stable Diffusion families: 1.x, 2.x, XL and the refiner."""
