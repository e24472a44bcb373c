"""Images from a model: prompts and their options, samplers by name, and the loop that draws."""
