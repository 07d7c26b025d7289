"""Base models: loading, prompts to embeddings, pictures. diffusers and transformers are imported inside functions only."""
