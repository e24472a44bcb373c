"""Whole checkpoints converted, merged and described, tensor by tensor."""
