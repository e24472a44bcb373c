"""Convert, merge and describe checkpoints, tensor by tensor."""
