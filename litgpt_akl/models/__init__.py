"""LitGPT's GPT as student and teacher, and the checkpoint directories that hold it."""
