"""Answers of a model to prompts, in batches, with LitGPT's key-value cache.

What is drawn for a prompt depends on its own seed alone, so neither batches nor processes change an answer, but for
the rounding of the model's own products.
"""

from collections.abc import Sequence
from contextlib import suppress

import lightning as L
import numpy as np
import torch
from litgpt.config import Config
from litgpt.generate.base import sample_top_p
from litgpt.model import GPT
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from litgpt_akl.messages import UserError
from litgpt_akl.models.parallel import all_reduce_max, reshard, unwrap

BATCH = 32
"""Prompts that a process answers together: their keys and values take less than training does, whose gradients and
activations are not there at that time."""
Seed = tuple[int, ...]
"""Whole numbers from 0 on, which together name what is drawn for one prompt."""


def longest_prompt(config: Config) -> int:
    """Tokens of the longest prompt that a model can answer.

    LitGPT's cache cannot take a prompt that is longer than a sliding window.
    """
    return min(config.block_size - 1, config.sliding_window_size or config.block_size)


def stop_sequences(tokenizer: Tokenizer, prompt_style: PromptStyle | None, ends: Sequence[int] = ()) -> list[list[int]]:
    """The ids that end an answer, wherever it is said which: one set for all that a run generates.

    Args:
        tokenizer: its EOS token, and those that generation_config.json names.
        prompt_style: what it names, as far as the tokenizer has it.
        ends: what ends the responses of the training data.
    """
    sequences = [[id] for id in (*getattr(tokenizer, "end_ids", (tokenizer.eos_id,)), *ends)]
    with suppress(ValueError):
        sequences += [] if prompt_style is None else map(list, prompt_style.stop_tokens(tokenizer))
    return [sequence for n, sequence in enumerate(sequences) if None not in sequence and sequence not in sequences[:n]]


def without_end(answer: list[int], ends: Sequence[list[int]]) -> list[int]:
    """An answer without the sequence that has ended it."""
    return next((answer[: -len(end)] for end in ends if answer[-len(end) :] == end), answer)


@torch.no_grad()
def generate(
    fabric: L.Fabric,
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    stop: Sequence[list[int]],
    vocab_size: int,
    seeds: Sequence[Seed] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    no_repeat_ngram: int | None = None,
    max_length: int | None = None,
) -> list[list[int]]:
    """One batch of answers, each with the sequence that ended it, if one did.

    All processes of a sharded model must ask together; each may have other prompts, as many as it likes, or none.

    Args:
        model: a GPT with a :class:`~litgpt_akl.models.gpt.Head`.
        prompts: the ids of each, ``[time]``.
        max_new_tokens: an answer ends after so many, or where ``max_length`` is reached.
        stop: sequences of ids that end an answer, from :func:`stop_sequences`.
        vocab_size: ids from here on are padding, and never drawn.
        seeds: one for each prompt; None takes the most probable id each time.
        temperature: divides the logits; above 0.
        top_k: no other ids are drawn than so many most probable ones (default: all).
        top_p: no other ids than the fewest that have so much of the probability together; above 0.
        no_repeat_ngram: no sequence of so many ids comes twice in prompt and answer together.
        max_length: tokens of prompt and answer together, at most (default: what the model reads).

    Raises:
        UserError: a prompt is longer than :func:`longest_prompt`.
    """
    config, bare = model.config, unwrap(model)
    for prompt in prompts:
        if len(prompt) > longest_prompt(config):
            raise UserError(
                f"A prompt has {len(prompt):,} tokens, but the longest that {config.name} can answer has"
                f" {longest_prompt(config):,}. Leave such records out."
            )
    longest = config.block_size if max_length is None else max_length
    answers = [
        _Answer(prompt.tolist(), min(max_new_tokens, longest - len(prompt)), stop, no_repeat_ngram)
        for prompt in prompts
    ]
    generators = None if seeds is None else [_generator(seed, fabric.device) for seed in seeds]
    training = model.training
    model.eval()
    # a process without prompts takes part with one token that nobody asked for
    rows, texts = list(range(len(answers))), [answer.prompt for answer in answers] or [[0]]
    capacity = max((len(answer.prompt) + answer.limit for answer in answers), default=1)
    _open_cache(bare, len(texts), capacity, fabric.device)
    ids = pad_sequence([torch.tensor(text, device=fabric.device) for text in texts], batch_first=True)
    positions = torch.arange(ids.size(1), device=fabric.device)
    last = torch.tensor([len(text) - 1 for text in texts], device=fabric.device)
    while all_reduce_max(fabric, len(rows)) > 0:
        logits = _next_logits(model, ids, positions, last)[:, :vocab_size].float()
        if rows:
            own = None if generators is None else [generators[row] for row in rows]
            forbidden = [answers[row].forbidden() for row in rows]
            chosen = _choose(logits, forbidden, own, temperature, top_k, top_p)
            for row, token in zip(rows, chosen, strict=True):
                answers[row].append(token)
            going = [place for place, row in enumerate(rows) if not answers[row].ended]
            if 0 < len(going) < len(rows):
                _keep_rows(bare, going, fabric.device)
            rows = [rows[place] for place in going]
        texts = [answers[row].text for row in rows] or [[0]]
        ids = torch.tensor([[text[-1]] for text in texts], device=fabric.device)
        positions = torch.tensor([[len(text) - 1] for text in texts], device=fabric.device)
        last = torch.zeros(len(texts), dtype=torch.int64, device=fabric.device)
    bare.clear_kv_cache()
    bare.max_seq_length = config.block_size
    model.train(training)
    reshard(bare)
    return [answer.tokens for answer in answers]


class _Answer:
    """An answer as far as it has come."""

    def __init__(self, prompt: list[int], limit: int, stop: Sequence[list[int]], no_repeat_ngram: int | None) -> None:
        self.prompt, self.limit, self._stop, self._ngram = prompt, limit, stop, no_repeat_ngram
        self.tokens: list[int] = []
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for end in range(no_repeat_ngram or len(prompt) + 1, len(prompt) + 1):
            self._remember(prompt[end - no_repeat_ngram : end])

    @property
    def text(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def ended(self) -> bool:
        return len(self.tokens) >= self.limit or any(self.tokens[-len(end) :] == end for end in self._stop)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self._remember(self.text)

    def _remember(self, text: list[int]) -> None:
        if self._ngram is not None and len(text) >= self._ngram:
            *before, last = text[-self._ngram :]
            self._followers.setdefault(tuple(before), []).append(last)

    def forbidden(self) -> list[int]:
        """Ids that would repeat a sequence."""
        if self._ngram is None:
            return []
        text = self.text
        return self._followers.get(tuple(text[len(text) - self._ngram + 1 :]), [])


def _generator(seed: Seed, device: torch.device) -> torch.Generator:
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(mixed)


def _choose(
    logits: Tensor,
    forbidden: Sequence[list[int]],
    generators: Sequence[torch.Generator] | None,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> list[int]:
    """An id for each row of ``logits`` ``[n, vocab]``: the most probable, or one drawn by the row's own generator.

    What is drawn is what LitGPT's ``sample`` draws of one row by the same generator.
    """
    for row, ids in enumerate(forbidden):
        logits[row, ids] = -torch.inf
    if generators is None:
        return logits.argmax(dim=-1).tolist()
    # of exponential waiting times with rates p the shortest is i's with probability p_i
    times = torch.stack([torch.empty_like(logits[0]).exponential_(generator=generator) for generator in generators])
    if top_k is not None:
        values, ids = torch.topk(logits, min(top_k, logits.size(-1)))
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, ids, values)
    logits = logits / temperature
    if top_p < 1:
        logits = torch.stack([sample_top_p(row, top_p) for row in logits])
    rates = torch.softmax(logits, dim=-1)
    return (rates / times.clamp_min_(torch.finfo(times.dtype).tiny)).argmax(dim=-1).tolist()


def _next_logits(model: nn.Module, ids: Tensor, positions: Tensor, last: Tensor) -> Tensor:
    """Logits ``[batch, vocab]`` after the token at place ``last`` ``[batch]`` of each row of ``ids`` ``[batch, time]``.

    What stands behind it is written over before it is ever looked at.
    """
    rows = torch.arange(len(ids), device=ids.device)
    with model.lm_head.output_of_head(lambda head, hidden: head.logits(hidden[rows, last])):
        return model(ids, positions, input_pos_maxp1=int(positions.max()) + 1)


def _open_cache(model: GPT, batch_size: int, capacity: int, device: torch.device) -> None:
    model.max_seq_length = capacity
    model.set_kv_cache(batch_size, device=device, dtype=model.lm_head.weight.dtype)
    if model.config.attention_logit_softcapping is not None:
        # there LitGPT adds the mask to the scores, as if it were not made of truth values
        model.mask_cache = torch.zeros_like(model.mask_cache, dtype=torch.float32).masked_fill_(
            ~model.mask_cache, -torch.inf
        )


def _keep_rows(model: GPT, places: list[int], device: torch.device) -> None:
    """Move what the cache has of some rows to its front: those rows are the batch from now on."""
    kept = torch.tensor(places, device=device)
    for block in model.transformer.h:
        for buffer in (block.attn.kv_cache.k, block.attn.kv_cache.v):
            buffer[: len(places)] = buffer[kept]
