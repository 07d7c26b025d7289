"""What becomes of adapters: the shelf they lie on, and what is made of them there."""
