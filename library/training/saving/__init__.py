"""What is saved and when: checkpoints, training states, metadata."""
