"""A run: set-up, steps, validation, checkpoints, logs."""
