"""Training: the objective, the optimizer, the state that a resume needs, and the loop that yields events."""
