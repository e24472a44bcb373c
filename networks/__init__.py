"""Adapters (LoRA and its relatives), usable from tools and other programs: on torch and library.checkpoints alone."""
