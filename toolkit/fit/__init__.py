"""Training; the only folder that imports trl."""
