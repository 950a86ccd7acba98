"""What a model is trained on, as a person reads it: one sample with its labels marked, and what made it."""

from textwrap import indent
from typing import Any

from litgpt.tokenizer import Tokenizer
from torch import Tensor

from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import tell
from litgpt_akl.models.tokenizer import token_map

OPEN, CLOSE = "⟦", "⟧"
"""What marks that which counts in the loss."""
LONGEST = 1200
"""Characters of a text that is shown."""


def tell_what_is_learnt(data: Any, dataset: TokenizedDataset, tokenizer: Tokenizer, stop: list[list[int]]) -> None:
    """Print what makes the texts, how much of them counts, and the first of them."""
    tell(f"Texts: {describe_format(data, len(dataset))}")
    tell(f"Labels: {describe_labels(dataset, tokenizer, stop)}")
    tell(f"The first, what is learnt in {OPEN}{CLOSE} ({dataset.place(0)}):")
    tell(indent(sample_text(dataset.read([0])[0], tokenizer), "  ", lambda line: True))


def describe_format(data: Any, samples: int) -> str:
    """What makes the texts of a data module's records: its chat template, its prompt style, or the module itself."""
    style = getattr(data, "prompt_style", None)
    by_style = type(data).__name__ if style is None else f"prompt style {type(style).__name__}"
    template, by_template = getattr(data, "template", None), getattr(data, "by_template", 0)
    if template is None or not by_template:
        return by_style
    by_chat = f"chat template of {template.path}"
    return by_chat if by_template >= samples else f"{by_chat} ({by_template:,} records), {by_style} (the others)"


def describe_labels(dataset: TokenizedDataset, tokenizer: Tokenizer, ends: list[list[int]]) -> str:
    """The share of the tokens that count, and what ends a response."""
    share = dataset.all_response_tokens / max(1, dataset.tokens)
    names = token_map(tokenizer)
    told = [" ".join(f"{names.get(id)} ({id})" for id in end) for end in ends]
    return f"{share:.1%} of the tokens are learnt; a response ends with {', '.join(told)}"


def sample_text(sample: dict[str, Tensor], tokenizer: Tokenizer) -> str:
    """A sample's text, special tokens too, in which what counts stands between ``OPEN`` and ``CLOSE``."""
    parts: list[tuple[bool, list[int]]] = []
    for id, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        counts = label != IGNORE_INDEX
        if not parts or parts[-1][0] != counts:
            parts.append((counts, []))
        parts[-1][1].append(id)
    texts = [f"{OPEN}{_decode(tokenizer, ids)}{CLOSE}" if counts else _decode(tokenizer, ids) for counts, ids in parts]
    text = "".join(texts)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.decode(ids, skip_special_tokens=False)
    return tokenizer.processor.decode(ids)
