"""What the numbers of a run come to: a sentence and four cards."""

import math
from typing import Any, NamedTuple

import numpy as np

from litgpt_akl.report.history import History


class Measure(NamedTuple):
    """A number of a validation, as the page shows it."""

    column: str
    title: str
    written: str
    lower_is_better: bool
    teacher: float | None = None
    """What the teacher itself would have; None if it was measured."""


CROSS_ENTROPY = Measure("cross_entropy", "Cross-entropy", "{:.3f}", True)
MEASURES = (
    Measure("forward_kl", "Forward KL", "{:.3f}", True, 0.0),
    Measure("reverse_kl", "Reverse KL", "{:.3f}", True, 0.0),
    Measure("agreement", "Agreement", "{:.1%}", False, 1.0),
    Measure("gap_closed", "Gap closed", "{:.1%}", False, 1.0),
)
ABOUT = {
    "forward_kl": "nats per token, KL(teacher, student)",
    "reverse_kl": "nats per token, KL(student, teacher)",
    "agreement": "of tokens have the same most probable next token",
}


def value(history: History, column: str, place: int = -1) -> float:
    """Of a validation, by default the last; NaN if there is none, or nothing was logged."""
    values = history.validation.get(column, ())
    return float(values[place]) if len(values) else math.nan


def last_step(history: History) -> int:
    steps = [*history.training.get("step", ()), *history.validation["step"]]
    return int(max(steps, default=0))


def verdict(history: History) -> str:
    """One sentence on how a run went."""
    steps = history.validation["step"]
    if len(steps) == 0:
        return "This run has not validated its student yet."
    before, after = value(history, "forward_kl", 0), value(history, "forward_kl")
    agreement = value(history, "agreement")
    if not math.isfinite(after):
        return f"At step {int(steps[-1]):,} the student's distributions are no numbers any more: look at the curves."
    state = f"forward KL is {after:.3g} nats per token, and both agree on {agreement:.0%} of the tokens"
    if len(steps) == 1 or not math.isfinite(before):
        return f"At step {int(steps[-1]):,}, the only one that was validated, {state}."
    done = int(steps[-1] - steps[0])
    at_first = value(history, "agreement", 0)
    came = "came closer to" if after < before else "did not come closer to"
    text = (
        f"In {done:,} steps the student {came} its teacher: forward KL went from {before:.3g} to {after:.3g} nats per"
    )
    if after < before and agreement < at_first:
        text += f" token; but the two agree on fewer of the tokens, {agreement:.0%} where it was {at_first:.0%}"
    else:
        text += f" token, and agreement from {at_first:.0%} to {agreement:.0%} of the tokens"
    best = int(np.nanargmin(history.validation["forward_kl"]))
    if value(history, "forward_kl", best) < 0.98 * after:
        closest = value(history, "forward_kl", best)
        text += f"; it was closest at step {int(steps[best]):,}, with {closest:.3g}, and final/ is of the last step"
    return f"{text}."


def cards(history: History) -> list[dict[str, Any]]:
    """The four measures: before, now, of the teacher, which way is better, and the part of the way that is gone."""
    if len(history.validation["step"]) == 0:
        return []
    is_first = history.validation["step"][0] == 0
    shown = []
    for measure in MEASURES:
        before, now = value(history, measure.column, 0) if is_first else math.nan, value(history, measure.column)
        about = ABOUT.get(measure.column)
        if measure.column == "gap_closed":
            numbers = [value(history, "cross_entropy", 0) if is_first else math.nan, value(history, "cross_entropy")]
            numbers.append(value(history, "teacher_cross_entropy"))
            about = "of cross-entropy's distance to the teacher: {} to {}, teacher {}".format(
                *(write(CROSS_ENTROPY, of) for of in numbers)
            )
            if now > 1:
                about += ". Over 100%: it fits the records better than its teacher does"
            elif not math.isfinite(now):
                about += ". There is no gap to close" if numbers[0] <= numbers[2] else ". Step 0 was not validated"
        part = (before - now) / (before - measure.teacher) if before != measure.teacher else math.nan
        shown.append(
            {
                "title": measure.title,
                "about": about,
                "better": "lower is better" if measure.lower_is_better else "higher is better",
                "values": {name: write(measure, of) for name, of in (("before", before), ("now", now))},
                "teacher": write(measure, measure.teacher),
                "part": min(max(part, 0.0), 1.0) if math.isfinite(part) else None,
            }
        )
    return shown


def write(measure: Measure, of: float) -> str:
    """A value as the page has it, a dash if there is none."""
    return measure.written.format(of) if math.isfinite(of) else "-"
