"""The loss on held-out images: plan and measurement."""
