"""CLIP text encoders: tokenizers, prompt weights, hidden states."""
