"""What an evaluation found, as a table and as JSON takes it."""

import math
from typing import Any

ROWS = {
    "forward_kl": ("forward KL to the teacher, nats", ".4f"),
    "reverse_kl": ("reverse KL to the teacher, nats", ".4f"),
    "adaptive_kl": ("adaptive KL to the teacher, nats", ".4f"),
    "agreement": ("share with the teacher's top-1 id", ".4f"),
    "cross_entropy": ("cross-entropy of the responses, nats", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "gap_closed": ("share of the cross-entropy gap closed", ".1%"),
    "kl_closed": ("share of the forward KL gone", ".1%"),
    "accuracy": ("share of the responses' ids predicted", ".4f"),
    "calibration_error": ("expected calibration error", ".4f"),
    "rouge_l": ("ROUGE-L of answers", ".2f"),
    "rouge_l_std": ("  standard deviation over seeds", ".2f"),
    "distinct_2": ("distinct-2 of answers", ".3f"),
    "answer_tokens": ("tokens of an answer", ".1f"),
}
"""What is printed, and how."""


def table(found: dict[str, dict[str, float]]) -> str:
    """What was measured of each model, for people."""
    roles = [role for role in ("before", "student", "teacher") if role in found]
    lines = [f"{'':38}" + "".join(f"{role:>12}" for role in roles)]
    for name, (label, form) in ROWS.items():
        values = [found[role].get(name, math.nan) for role in roles]
        if not all(map(math.isnan, values)):
            cells = ["" if math.isnan(value) else f"{value:{form}}" for value in values]
            lines.append(f"{label:38}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def nan_as_null(value: Any) -> Any:
    """The same with null for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {name: nan_as_null(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
