"""Entry points under kohya's names to tools/: what prepares metadata files for fine-tuning."""
