"""Of several students that a budget allows the one that is nearest to its teacher, at once and after a few steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from litgpt_akl.loss.divergences import forward_kl
from litgpt_akl.messages import progress_bar, say
from litgpt_akl.models.candidates import Candidate
from litgpt_akl.models.depth import BLOCK_BYTES, DepthSearch
from litgpt_akl.models.importance import Importance
from litgpt_akl.models.layerwise import LayerwiseModel, Sample
from litgpt_akl.models.slicing import Kept, SlicedWeights, choose_parts
from litgpt_akl.models.student_checkpoint import TeacherFiles
from litgpt_akl.models.token_time import Speed
from litgpt_akl.models.vocabulary import without_padding
from litgpt_akl.teacher.cache_size import readable

FINALISTS = 3
"""Candidates that are trained for a few steps."""


@dataclass
class Measured:
    """A candidate, what it keeps of the teacher, and how far it is from it in nats per response token."""

    candidate: Candidate
    kept: Kept
    parameters: int
    memory: int
    """Bytes of its weights as they are written."""
    forward_kl: float
    forward_kl_after: float | None = None
    """After a few steps; None if it was not trained."""
    tokens_per_second: float = math.nan
    """Of one answer; what it varies by is half the distance between the quartiles of the measurements."""
    tokens_per_second_spread: float = math.nan
    speed: float = math.nan
    """The same as a multiple of the teacher's, which was measured in turns with it."""
    chosen: bool = False

    def set_speed(self, of_teacher: float, speed: Speed) -> None:
        """Note what was measured, beside a teacher of so many tokens in a second."""
        self.speed = speed.ratio
        self.tokens_per_second, self.tokens_per_second_spread = (of_teacher * value for value in speed)

    def record(self) -> dict[str, Any]:
        """For a file."""
        found = {name: value for name, value in asdict(self).items() if name not in ("candidate", "kept")}
        return {"layers": self.candidate.layers, **self.candidate.sizes, **found, "kept": self.kept.layers}


class CandidateSearch:
    """Measures candidates on held-out samples, one block of one of them in memory at a time.

    ``layers_of`` says which layers a student of so many has.
    """

    def __init__(
        self,
        teacher: TeacherFiles,
        model: LayerwiseModel,
        importance: Importance,
        layers_of: Callable[[int], list[int]],
        samples: Sequence[Sample],
        vocab_size: int,
    ) -> None:
        self._teacher, self._model, self._importance, self._layers_of = teacher, model, importance, layers_of
        self._samples, self._vocab_size = samples, vocab_size

    @torch.no_grad()
    def measure(self, candidates: Sequence[Candidate]) -> list[Measured]:
        """All candidates without any training, the nearest one first."""
        say(f"Measuring {len(candidates)} candidates on {len(self._samples)} held-out records.")
        config, found = self._model.config, []
        runs = (config.n_layer + sum(candidate.layers for candidate in candidates)) * len(self._samples)
        known = {"total": runs, "unit": " blocks", "unit_scale": True, "leave": False}
        with progress_bar(desc="measuring candidates", **known) as bar:
            teacher = self._final_hidden(self._model, bar.update)
            for candidate in candidates:
                kept = choose_parts(self._importance, config, self._layers_of(candidate.layers), candidate.sizes)
                student = self._student(kept, candidate.sizes)
                hidden = self._final_hidden(student, bar.update)
                parameters = self._teacher.size_of(kept.layers, candidate.sizes).whole
                memory = parameters * self._teacher.bytes_per_parameter
                found.append(Measured(candidate, kept, parameters, memory, self._forward_kl(teacher, student, hidden)))
        return sorted(found, key=lambda each: each.forward_kl)

    def _student(self, kept: Kept, sizes: dict[str, int]) -> LayerwiseModel:
        whole = without_padding(self._teacher.weights, self._teacher.ids)
        weights = SlicedWeights(whole, self._teacher.config, kept)
        longest = max(len(sample.input_ids) for sample in self._samples)
        config = self._teacher.config_of(kept.layers, sizes)
        return LayerwiseModel(config, weights, self._model.device, self._model.dtype, longest)

    def _final_hidden(self, model: LayerwiseModel, advance: Callable[[int], object]) -> list[Tensor]:
        every = range(model.config.n_layer)
        found = DepthSearch(model, self._samples, self._vocab_size).final_hidden(every, advance=advance)
        return [hidden[0] for hidden in found]

    def _forward_kl(self, teacher: list[Tensor], student: LayerwiseModel, hidden: list[Tensor]) -> float:
        """The mean over all response tokens, of final hidden states ``[n, n_embd]`` of each sample."""
        total, rows = torch.zeros((), dtype=torch.float64), max(1, BLOCK_BYTES // (8 * self._vocab_size))
        for wanted, found in zip(teacher, hidden, strict=True):
            for one, other in zip(wanted.split(rows), found.split(rows), strict=True):
                p, q = self._model.lm_head.logits(one), student.lm_head.logits(other)
                total += forward_kl(p[:, : self._vocab_size], q[:, : self._vocab_size]).sum().cpu()
        return total.item() / sum(map(len, teacher))


def mark_best(measured: list[Measured], steps: int, train: Callable[[Measured], float]) -> Measured:
    """Mark the best candidate, and return it: that nearest to the teacher after so many steps, of the best few at once.

    ``train`` trains one, and returns its forward KL then; with no steps the nearest one at once is best.
    """
    best = measured[:FINALISTS]
    if steps == 0 or len(measured) == 1:
        chosen = measured[0]
    else:
        # what is known by now, since training takes its time
        say(table(measured, 0))
        for number, each in enumerate(best, start=1):
            say(f"Training candidate {number} of {len(best)} for {steps} steps: {describe(each.candidate)}.")
            each.forward_kl_after = train(each)
        chosen = min(best, key=lambda each: each.forward_kl_after)
    chosen.chosen = True
    return chosen


def describe(candidate: Candidate) -> str:
    """In words: layers, and sizes that a model has."""
    sizes = ", ".join(f"{name} {size}" for name, size in candidate.sizes.items() if size)
    return f"{candidate.layers} layers, {sizes}"


def table(measured: Sequence[Measured], steps: int) -> str:
    """All candidates in 80 columns, the chosen one with a mark, those that were trained first."""
    has_experts = any(each.candidate.sizes["experts"] for each in measured)
    widths = {"width": 6, "mlp": 6, "heads": 6} | ({"experts": 8} if has_experts else {})
    head = "  layers" + "".join(f"{name:>{width}}" for name, width in widths.items())
    head += f"{'params':>8}{'memory':>9}{'tokens/s':>12}{'KL':>8}"
    lines = [head + (f"{f'after {steps}':>9}" if steps else "")]
    for each in sorted(
        measured, key=lambda one: (one.forward_kl_after is None, one.forward_kl_after or one.forward_kl)
    ):
        layers, sizes, _ = each.candidate
        line = f"{'>' if each.chosen else ' '} {layers:>6}"
        line += "".join(f"{sizes[name]:>{width}}" for name, width in widths.items())
        line += f"{_count(each.parameters):>8}{readable(each.memory):>9}{_speed(each):>12}{each.forward_kl:>8.3f}"
        lines.append(line + ("" if each.forward_kl_after is None else f"{each.forward_kl_after:>9.3f}"))
    return "\n".join(lines)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _speed(measured: Measured) -> str:
    digits = 0 if measured.tokens_per_second >= 100 else 1
    return f"{measured.tokens_per_second:,.{digits}f} ±{measured.tokens_per_second_spread:,.{digits}f}"
