"""Convert LoRA files between the formats of kohya, diffusers and PEFT."""
