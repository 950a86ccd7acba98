"""A model's responses to held-out prompts, and how near they are to the references.

The protocol is that of the work on distilling language models that the paper follows (Gu et al., MiniLLM, arXiv
2306.08543; Wu et al., arXiv 2404.02657): responses are drawn at temperature 1 from the whole distribution, no 6 tokens
come twice in a row, five decoding seeds, ROUGE-L with stemming, the best of several references, times 100.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import lightning as L
import torch
from litgpt.tokenizer import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import together
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import UserError, progress_bar
from litgpt_akl.models.generation import generate, without_end
from litgpt_akl.models.parallel import all_gather_object


@dataclass
class Question:
    """A prompt and people's responses to it."""

    number: int
    """Of the first sample that asks it."""
    prompt: Tensor
    """``[time]``."""
    references: list[str]


def find_questions(
    dataset: TokenizedDataset, numbers: Sequence[int], tokenizer: Tokenizer, stop: Sequence[list[int]]
) -> list[Question]:
    """Samples' prompts, each once, with the first responses of all that have it; UserError if one has no prompt."""
    questions: dict[tuple[int, ...], Question] = {}
    for number, sample in zip(numbers, dataset.read(list(numbers)), strict=True):
        counted = sample["labels"] != IGNORE_INDEX
        start = int(counted.int().argmax())
        if start == 0:
            raise UserError(
                f"{dataset.place(number)}: all of it counts as a response, so there is no prompt to answer.\n"
                "Give --data.mask_prompt true, or leave answers out with --generation.seeds '[]'."
            )
        stretch = (~counted[start:]).int()
        end = start + (int(stretch.argmax()) if stretch.any() else len(stretch))
        prompt, response = sample["input_ids"][:start], sample["input_ids"][start:end].tolist()
        question = questions.setdefault(tuple(prompt.tolist()), Question(number, prompt, []))
        question.references.append(tokenizer.decode(torch.tensor(without_end(response, stop))))
    return list(questions.values())


@dataclass
class Responses:
    """A model's responses to questions, for one seed."""

    seed: int
    texts: list[str]
    lengths: list[int]
    """In tokens, without what ends a response."""
    ended: list[bool]
    """Whether a response came to its end before the limit of its length."""


def take_turns(
    fabric: L.Fabric, batches: Sequence[list[int]], read: Callable[[list[int]], Sequence[Any]], bar: tqdm
) -> list[Any]:
    """What ``read`` makes of each place; the processes take batches of places in turn, and all have all in the end.

    One that has no batch left reads an empty one, since sharded models only run together. The bar counts places.
    """
    world_size, found = fabric.world_size, {}
    for turn in range(0, len(batches), world_size):
        own = turn + fabric.global_rank
        batch = batches[own] if own < len(batches) else []
        found.update(zip(batch, read(batch), strict=True))
        bar.update(sum(map(len, batches[turn : turn + world_size])))
    found = {place: value for part in all_gather_object(found) for place, value in part.items()}
    return [found[place] for place in range(len(found))]


class ResponseSampler:
    """Draws the responses of models to the same questions, which every process has all of.

    ``stop`` is what ends a response, from :func:`~litgpt_akl.models.generation.stop_sequences`, and ``most_tokens`` how
    many of prompts are read together, padding counted; None for no such limit. ``sampling`` is what else
    :func:`~litgpt_akl.models.generation.generate` is told where ids are drawn.
    """

    def __init__(
        self,
        fabric: L.Fabric,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        stop: Sequence[list[int]],
        vocab_size: int,
        args: GenerationArgs,
        most_tokens: int | None,
        **sampling: Any,
    ) -> None:
        self.fabric, self.questions, self.tokenizer = fabric, questions, tokenizer
        self.stop, self.vocab_size, self.args, self.sampling = stop, vocab_size, args, sampling
        self._batches = together([question.prompt for question in questions], args.batch_size, most_tokens)

    def sample(self, model: nn.Module, name: str) -> list[Responses]:
        """A model's responses for each seed; all processes ask together, and each has all responses in the end."""
        # one is enough where nothing is drawn
        seeds = self.args.seeds[: 1 if self.args.temperature == 0 else None]
        total, quiet = len(seeds) * len(self.questions), not self.fabric.is_global_zero
        with progress_bar(total=total, desc=f"{name}: answering", unit="answer", disable=quiet) as bar:
            return [self.sample_once(model, seed, bar) for seed in seeds]

    def sample_once(self, model: nn.Module, seed: int, bar: tqdm) -> Responses:
        """The same for one seed; the bar is moved on by the questions."""

        def answer(places: list[int]) -> list[list[int]]:
            began = time.perf_counter()
            responses = self._generate(model, [self.questions[place] for place in places], seed)
            rate = sum(map(len, responses)) * self.fabric.world_size / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            return responses

        drawn = take_turns(self.fabric, self._batches, answer, bar)
        ids = [without_end(response, self.stop) for response in drawn]
        texts = [self.tokenizer.decode(torch.tensor(response)) for response in ids]
        ended = [len(whole) > len(response) for whole, response in zip(drawn, ids, strict=True)]
        return Responses(seed, texts, list(map(len, ids)), ended)

    def _generate(self, model: nn.Module, questions: Sequence[Question], seed: int) -> list[list[int]]:
        args, prompts = self.args, [question.prompt for question in questions]
        options = {"max_new_tokens": args.max_new_tokens, "no_repeat_ngram": args.no_repeat_ngram, "stop": self.stop}
        if args.temperature > 0:
            seeds = [(seed, question.number) for question in questions]
            options |= {"seeds": seeds, "temperature": args.temperature, **self.sampling}
        return generate(self.fabric, model, prompts, vocab_size=self.vocab_size, **options)


def rate(questions: Sequence[Question], responses: Sequence[Responses]) -> dict[str, float]:
    """How good a model's responses are, as means over seeds.

    Returns:
        ``rouge_l``: F-measure times 100 to the best reference, mean over questions, with its standard deviation over
        seeds ``rouge_l_std`` (NaN for one seed); ``distinct_2``: different pairs of neighbouring words of a seed's
        responses, per word; ``answer_tokens``: mean length.
    """
    # it imports nltk, half a second that other commands are not to wait for
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    references = [question.references for question in questions]
    scores = []
    for of in responses:
        rated = map(scorer.score_multi, references, of.texts)
        scores.append(100 * fmean(score["rougeL"].fmeasure for score in rated))
    return {
        "rouge_l": fmean(scores),
        "rouge_l_std": stdev(scores) if len(scores) > 1 else float("nan"),
        "distinct_2": fmean(distinct_pairs(of.texts) for of in responses),
        "answer_tokens": fmean(fmean(of.lengths) for of in responses),
    }


def distinct_pairs(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words, divided by the number of words; 0 of no words.

    This is distinct-2 of Li et al., arXiv 1510.03055: it is scaled by all words, not by the pairs. Words are what white
    space parts.
    """
    words = [text.split() for text in texts]
    pairs = {pair for each in words for pair in zip(each, each[1:], strict=False)}
    return len(pairs) / max(1, sum(map(len, words)))


def as_lines(questions: Sequence[Question], responses: dict[str, list[Responses]]) -> str:
    """A line of JSON for each question: its references, and each model's responses by seed."""
    lines = ""
    for place, question in enumerate(questions):
        by_role = {role: {str(of.seed): of.texts[place] for of in every} for role, every in responses.items()}
        line = {"number": question.number, "references": question.references, "answers": by_role}
        lines += json.dumps(line) + "\n"
    return lines
