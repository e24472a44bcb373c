"""Sample images during training: plan and drawing."""
