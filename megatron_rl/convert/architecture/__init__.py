"""What a model is, read from its Hugging Face config.json: sizes, layers, positions. Without torch."""
