"""Full training with the weights, gradients and optimizer state shared out over the processes: torch's FSDP2."""
