"""Adapters (LoRA and its relatives), for this and other programs: imports only torch and library.checkpoints."""
