"""What the figures of a run are to show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass
class Line:
    """One quantity of a panel."""

    column: str
    """Of the training log; ``val_column`` is the validation's."""
    label: str
    spread: str | None = None
    """The column of the squares' mean, if a band of one standard deviation is drawn."""


@dataclass
class Panel:
    """What one figure is to show."""

    title: str
    unit: str
    lines: Sequence[Line]
    numbers: Literal["real", "log", "share", "whole", "tiny"] = "real"
    """How values are written, and whether the axis is logarithmic."""
    about: str = ""


PANELS = (
    Panel("Loss", "nats per token", [Line("loss", "loss")], about="What is minimised."),
    Panel("Divergence", "nats per token", [Line("divergence", "divergence")], about="From the teacher to the student."),
    Panel(
        "Cross-entropy",
        "nats per token",
        [Line("cross_entropy", "student"), Line("teacher_cross_entropy", "teacher")],
        about="Of the recorded responses.",
    ),
    Panel(
        "Forward and reverse KL",
        "nats per token",
        [Line("forward_kl", "forward"), Line("reverse_kl", "reverse")],
        about="KL(teacher, student) and KL(student, teacher).",
    ),
    Panel(
        "Weight of forward KL, h",
        "share",
        [Line("h", "h", spread="h_squared")],
        "share",
        "Head gap / (head gap + tail gap); the band is one standard deviation over tokens.",
    ),
    Panel(
        "Head gap and tail gap",
        "sum of |p - q|",
        [Line("head_gap", "head"), Line("tail_gap", "tail")],
        about="Where the student still differs from its teacher.",
    ),
    Panel(
        "Agreement and gap closed",
        "share",
        [Line("agreement", "same top token"), Line("gap_closed", "gap closed")],
        "share",
        "Gap closed: of the cross-entropy's distance to the teacher at step 0.",
    ),
    Panel(
        "Accuracy and confidence",
        "share",
        [
            Line("accuracy", "student's accuracy"),
            Line("confidence", "student's confidence"),
            Line("teacher_accuracy", "teacher's accuracy"),
            Line("teacher_confidence", "teacher's confidence"),
        ],
        "share",
        "How often the top token is the recorded one, and the probability it has.",
    ),
    Panel("Learning rate", "learning rate", [Line("learning_rate", "learning rate")], "tiny"),
    Panel("Gradient norm", "norm", [Line("gradient_norm", "gradient norm")], "log", "Before clipping."),
    Panel(
        "Throughput",
        "tokens/s",
        [Line("tokens_per_second", "all tokens"), Line("response_tokens_per_second", "response tokens")],
        "whole",
        "While it trains; validating and saving do not count.",
    ),
    Panel(
        "Memory",
        "GB",
        [Line("memory_gb", "memory"), Line("memory_reserved_gb", "reserved by the allocator")],
        about="Peak on a GPU, of the process on a CPU.",
    ),
)
