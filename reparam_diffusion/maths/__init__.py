"""Formulas on tensors: no files, no models, no settings."""
