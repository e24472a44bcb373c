"""What keeps a model from forgetting while it learns: anchors to the model as it was."""
