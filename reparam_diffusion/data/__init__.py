"""Pictures, captions and what is drawn from them."""
