"""The training run: loop, step, metrics, validation."""
