"""Data: datasets of tokenized samples, which samples make which step, and the step batches that training reads."""

from litgpt_akl.data.streaming import StreamingSFT

__all__ = ["StreamingSFT"]
