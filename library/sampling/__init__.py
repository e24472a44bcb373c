"""Draw images with a model: prompts and their options, samplers, the sampling loop."""
