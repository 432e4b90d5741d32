"""Step to disk and back, without pickle."""
