"""Adapter files: how layers are named, reading every known format, writing ours, PEFT's and diffusers'."""
