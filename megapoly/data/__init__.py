"""From text to batches: the .bin/.idx format, preprocessing and the order of samples."""
