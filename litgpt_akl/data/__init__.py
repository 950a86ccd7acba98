"""Data: stores of samples, the plan of which samples make which step, and the windows that training reads."""

from litgpt_akl.data.streaming import StreamingSFT

__all__ = ["StreamingSFT"]
