"""megapoly: multilingual language models from raw text to a Hugging Face checkpoint, in 3D parallel."""

__version__ = "0.1.0"
