"""The Hugging Face Hub: uploads of what a run saves, and training states that are read from there."""
