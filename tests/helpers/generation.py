"""The slow, obvious way to generate: the most probable id each time, without a cache and one prompt at a time."""

import torch
from litgpt.model import GPT

VOCAB = 1000
"""Less than what the models are padded to."""


def slow_answer(model: GPT, prompt: torch.Tensor, max_new_tokens: int, eos: int | None = None) -> list[int]:
    """The most probable id each time, by the whole text through the model each time."""
    text = prompt.tolist()
    for _ in range(max_new_tokens):
        with torch.no_grad():
            text.append(model(torch.tensor([text]))[0, -1, :VOCAB].argmax().item())
        if text[-1] == eos:
            break
    return text[len(prompt) :]
