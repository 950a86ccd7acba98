"""A LitGPT model as lm-eval (the LM Evaluation Harness) asks for it: likelihoods and answers, also of sharded ones."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from litgpt.model import GPT
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from litgpt_akl.data.steps import together
from litgpt_akl.messages import UserError, progress_bar
from litgpt_akl.models.generation import generate, longest_prompt, stop_sequences, without_end
from litgpt_akl.models.parallel import reshard
from litgpt_akl.models.tokenizer import OneBosTokenizer
from litgpt_akl.training.responses import take_turns

HEAD_TOKENS = 512
"""Tokens whose logits are there at a time."""
NEW_TOKENS = 256
"""Of an answer at most, where a task does not say, as lm-eval has it."""
Request = tuple[Any, list[int], list[int]]
"""A name, and the ids of a context and of its continuation."""


class TaskModel(TemplateLM):
    """A LitGPT model as lm-eval asks for it; all processes of a sharded one ask together, each reads its share."""

    def __init__(
        self, fabric: L.Fabric, model: GPT, tokenizer: OneBosTokenizer, vocab_size: int, batch_size: int, name: str
    ) -> None:
        super().__init__()
        self._fabric, self._model, self._text = fabric, model, tokenizer
        self._vocab_size, self._batch_size, self._name = vocab_size, batch_size, name
        self.max_length = model.config.block_size
        self.cut = 0
        """Prompts that lost their begin, since the model reads no more."""

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._text.eos_id if self._text.bos_id is None else self._text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._text.encode(string, bos=add_special_tokens).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_likelihood
        return sums

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether each of its ids is the most probable one."""
        texts = [torch.tensor((context + ids)[-self.max_length - 1 :]) for _, context, ids in requests]
        self.cut += sum(len(context) + len(ids) > self.max_length + 1 for _, context, ids in requests)
        if any(len(ids) >= len(text) for (_, _, ids), text in zip(requests, texts, strict=True)):
            raise UserError(
                f"A task asks for the likelihood of more than the {self.max_length:,} tokens that {self._name} reads.\n"
                "Leave this task out of --tasks."
            )

        def score(places: list[int]) -> list[tuple[float, bool]]:
            return self._score([texts[place] for place in places], [len(requests[place][2]) for place in places])

        return self._in_turn(texts, score, "likelihood")

    @torch.no_grad()
    def _score(self, texts: list[Tensor], counted: list[int]) -> list[tuple[float, bool]]:
        """The same for one batch: the likelihood of the last ``counted`` ids of each text."""
        # a process without texts takes part with one token that nobody asked for
        inputs = [text[:-1] for text in texts] or [torch.zeros(1, dtype=torch.int64)]
        places = [
            (row, len(text) - 1 - count + place)
            for row, (text, count) in enumerate(zip(texts, counted, strict=True))
            for place in range(count)
        ]
        rows, columns = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(1)
        targets = pad_sequence([text[1:] for text in texts] or inputs, batch_first=True)[rows, columns]

        def compare(head: torch.nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self._compare(head, hidden[rows, columns], targets)

        with self._model.lm_head.output_of_head(compare):
            of_target, top = self._model(pad_sequence(inputs, batch_first=True).to(self._fabric.device))
        parts = zip(of_target.split(counted), top.split(counted), strict=True) if counted else ()
        return [(float(nats.sum()), bool(likeliest.all())) for nats, likeliest in parts]

    def _compare(self, head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target ``[n]`` after ``hidden`` ``[n, n_embd]``, and whether it is the likeliest."""
        of_target, top = [], []
        for states, ids in zip(hidden.split(HEAD_TOKENS), targets.to(hidden.device).split(HEAD_TOKENS), strict=True):
            logits = head.logits(states)[:, : self._vocab_size].float()
            of_target.append(logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0].double())
            top.append(logits.argmax(dim=-1) == ids)
        return torch.cat(of_target).cpu(), torch.cat(top).cpu()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        options = [request.args[1] for request in requests]
        limits = [min(each.get("max_gen_toks", NEW_TOKENS), self.max_length - 1) for each in options]
        whole = [self._text.encode(request.args[0]) for request in requests]
        longest = longest_prompt(self._model.config)
        prompts = [ids[-min(longest, self.max_length - limit) :] for ids, limit in zip(whole, limits, strict=True)]
        self.cut += sum(len(prompt) < len(ids) for prompt, ids in zip(prompts, whole, strict=True))

        # a batch is of one temperature
        temperatures = [each.get("temperature", 1.0) if each.get("do_sample", False) else 0.0 for each in options]
        answers: dict[int, str] = {}
        for temperature in sorted({*temperatures}):
            own = [place for place, each in enumerate(temperatures) if each == temperature]

            def answer(places: list[int], own: list[int] = own, temperature: float = temperature) -> list[str]:
                return self._answer([own[place] for place in places], prompts, limits, options, temperature)

            answers.update(zip(own, self._in_turn([prompts[place] for place in own], answer, "answer"), strict=True))
        return [answers[place] for place in range(len(requests))]

    def _answer(
        self, places: list[int], prompts: list[Tensor], limits: list[int], options: list[dict], temperature: float
    ) -> list[str]:
        """A batch of answers, each up to the first of the texts that end it."""
        untils = [[until] if isinstance(until := options[place].get("until", []), str) else until for place in places]
        ends = stop_sequences(self._text, None)
        known = [self._text.encode(text, bos=False).tolist() for until in untils for text in until if text]
        seeds = {"seeds": [(0, place) for place in places], "temperature": temperature} if temperature > 0 else {}
        answers = generate(
            self._fabric,
            self._model,
            [prompts[place] for place in places],
            max_new_tokens=max((limits[place] for place in places), default=1),
            stop=ends + known,
            vocab_size=self._vocab_size,
            **seeds,
        )
        texts = []
        for place, until, ids in zip(places, untils, answers, strict=True):
            text = self._text.decode(torch.tensor(without_end(ids[: limits[place]], ends)))
            texts.append(text[: min((text.find(end) for end in until if end and end in text), default=len(text))])
        return texts

    def _in_turn(self, texts: Sequence[Tensor], read: Callable[[list[int]], list], unit: str) -> list[Any]:
        """What ``read`` makes of the texts of each place, in batches of like length that the processes take in turn."""
        batches = together(texts, self._batch_size, None)[::-1]
        quiet = not self._fabric.is_global_zero
        with progress_bar(total=len(texts), desc=f"{self._name}: tasks", unit=unit, disable=quiet) as bar:
            found = take_turns(self._fabric, batches, read, bar)
        reshard(self._model)
        return found
