"""The weight tables, one file a family: which Hugging Face tensors a Megatron parameter is made of, and how it is cut."""
