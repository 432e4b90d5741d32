"""Layers to loss: one transformer for the GPT-2, GPT-NeoX and LLaMA families."""
