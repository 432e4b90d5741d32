"""Hugging Face checkpoints: the names and shapes of three model classes, and the files of an export."""
