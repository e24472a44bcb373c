"""LoRA files of kohya, diffusers and PEFT, each into each other."""
