"""The architecture of a model, read from its Hugging Face config.json without torch: sizes, layers, positions."""
