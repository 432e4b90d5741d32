"""Gradients to step: clipping, sharded AdamW, schedules."""
