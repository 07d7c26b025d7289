"""Runs as folders and processes: created, launched, followed, asked to stop."""
