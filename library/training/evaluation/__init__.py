"""DreamBooth's measures during training: plan and evaluation."""
