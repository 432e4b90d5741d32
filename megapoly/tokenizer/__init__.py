"""From text to token ids: loading and training tokenizers."""
