"""Tensor maths of the LoRA tools: merge, resize, split and extract. Works on files, without a model."""
