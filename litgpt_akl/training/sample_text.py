"""What a model is trained on, as a person reads it: one sample with its labels marked, and what made it."""

from typing import Any

from litgpt.tokenizer import Tokenizer
from torch import Tensor

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.models.tokenizer import token_map

OPEN, CLOSE = "⟦", "⟧"
"""What marks that which counts in the loss."""
END_OF_LINE = "↵ "
LONGEST = 1200
"""Characters of a text that is kept."""
SHOWN = 480
"""Of those, on a terminal."""


def first_sample(sample: dict[str, Any]) -> str:
    """A paragraph of what :func:`describe_sample` gives, with what is learnt and the ends of lines marked."""
    parts = _cut(sample["parts"], SHOWN)
    text = "".join(f"{OPEN}{part}{CLOSE}" if counts else part for counts, part in parts)
    return f"{sample['place']}; what is learnt stands in {OPEN}{CLOSE}:\n{text.replace(chr(10), END_OF_LINE)}"


def describe_sample(
    data: Any, dataset: TokenizedDataset, tokenizer: Tokenizer, stop: list[list[int]]
) -> dict[str, Any]:
    """What makes the texts, how much of them counts, and the first of them: ``texts``, ``labels``, ``place``, ``parts``

    The parts are those of :func:`marked_parts`; all can be written as JSON.
    """
    return {
        "texts": describe_format(data, len(dataset)),
        "labels": describe_labels(dataset, tokenizer, stop),
        "place": dataset.place(0),
        "parts": marked_parts(dataset.read([0])[0], tokenizer),
    }


def describe_format(data: Any, samples: int) -> str:
    """What makes the texts of a data module's records: its chat template, its prompt style, or the module itself."""
    style = getattr(data, "prompt_style", None)
    by_style = type(data).__name__ if style is None else f"prompt style {type(style).__name__}"
    template, by_template = getattr(data, "template", None), getattr(data, "by_template", 0)
    if template is None or not by_template:
        return by_style
    by_chat = f"chat template of {template.path}"
    return by_chat if by_template >= samples else f"{by_chat} ({by_template:,} records), {by_style} (the others)"


def describe_mask(data: Any) -> str:
    """Whether the prompts of a data module's records count, to follow :func:`describe_format`; empty if it says not."""
    return {True: ", prompts masked", False: ", prompts count too"}.get(getattr(data, "mask_prompt", None), "")


def describe_labels(dataset: TokenizedDataset, tokenizer: Tokenizer, ends: list[list[int]]) -> str:
    """The share of the tokens that count, and what ends a response."""
    share = dataset.all_response_tokens / max(1, dataset.tokens)
    names = token_map(tokenizer)
    told = [" ".join(f"{names.get(id)} ({id})" for id in end) for end in ends]
    return f"{share:.1%} of the tokens are learnt; a response ends with {', '.join(told)}"


def marked_parts(sample: dict[str, Tensor], tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """A sample's text, special tokens too, in parts: whether each counts in the loss, and what it says.

    The middle of a text of more than ``LONGEST`` characters is left out.
    """
    parts: list[tuple[bool, list[int]]] = []
    for id, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        counts = label != IGNORE_INDEX
        if not parts or parts[-1][0] != counts:
            parts.append((counts, []))
        parts[-1][1].append(id)
    texts = [(counts, _decode(tokenizer, ids)) for counts, ids in parts]
    return _cut(texts, LONGEST)


def _cut(parts: list[tuple[bool, str]], longest: int) -> list[tuple[bool, str]]:
    left_out = sum(len(text) for _, text in parts) - longest
    return parts if left_out <= 0 else _without_middle(parts, longest // 2, longest // 2 + left_out)


def _without_middle(parts: list[tuple[bool, str]], begin: int, end: int) -> list[tuple[bool, str]]:
    """The same parts without the characters from ``begin`` to ``end``, in whose place stands a mark."""
    kept, start = [], 0
    for counts, text in parts:
        left, right = text[: max(0, begin - start)], text[max(0, end - start) :]
        mark = " [...] " if start <= begin < start + len(text) else ""
        if left or mark or right:
            kept.append((counts, left + mark + right))
        start += len(text)
    return kept


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.decode(ids, skip_special_tokens=False)
    return tokenizer.processor.decode(ids)
