"""Of several students that a budget allows the one that is nearest to its teacher, at once and after a few steps."""

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
from litgpt_akl.models.vocabulary import without_padding

FINALISTS = 3
"""Candidates that are trained for a few steps."""


@dataclass
class Measured:
    """A candidate, what it keeps of the teacher, and how far it is from it in nats per response token."""

    candidate: Candidate
    kept: Kept
    forward_kl: float
    forward_kl_after: float | None = None
    """After a few steps; None if it was not trained."""
    chosen: bool = False

    def record(self) -> dict[str, Any]:
        """For a file."""
        layers, sizes, parameters = self.candidate
        found = {name: value for name, value in asdict(self).items() if name not in ("candidate", "kept")}
        return {"layers": layers, **sizes, "parameters": parameters, **found, "kept": self.kept.layers}


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
                exact = candidate._replace(parameters=self._teacher.size_of(kept.layers, candidate.sizes).whole)
                found.append(Measured(exact, kept, self._forward_kl(teacher, student, hidden)))
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
    names = [name for name in measured[0].candidate.sizes if name != "experts" or has_experts]
    head = f"  {'layers':>6}" + "".join(f"{name:>7}" for name in names) + f"{'parameters':>13}{'KL at once':>12}"
    lines = [head + (f"{f'after {steps} steps':>16}" if steps else "")]
    key = [(each.forward_kl_after is None, each.forward_kl_after or each.forward_kl) for each in measured]
    for _, each in sorted(zip(key, measured, strict=True), key=lambda pair: pair[0]):
        layers, sizes, parameters = each.candidate
        line = f"{'>' if each.chosen else ' '} {layers:>6}" + "".join(f"{sizes[name]:>7}" for name in names)
        line += f"{parameters / 1e6:>11,.1f} M{each.forward_kl:>12.3f}"
        lines.append(line + ("" if each.forward_kl_after is None else f"{each.forward_kl_after:>16.3f}"))
    return "\n".join(lines)
