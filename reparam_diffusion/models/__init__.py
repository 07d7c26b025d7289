"""Base models: loading, prompts to embeddings, pictures. diffusers and transformers load inside functions."""
