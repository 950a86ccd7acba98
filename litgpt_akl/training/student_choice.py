"""What of a teacher a student keeps: by the calibration records, or evenly spread layers without them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from litgpt_akl.messages import say
from litgpt_akl.models.candidates import Candidate, form_candidates
from litgpt_akl.models.depth import Removal, even_layers, influential_layers
from litgpt_akl.models.importance import Importance
from litgpt_akl.models.layerwise import LayerwiseModel, Sample
from litgpt_akl.models.parallel import return_freed_memory
from litgpt_akl.models.slicing import Kept, choose_parts
from litgpt_akl.models.student_checkpoint import TeacherFiles
from litgpt_akl.models.token_time import ROUNDS
from litgpt_akl.models.weights import fingerprint
from litgpt_akl.training.budget import Budget, StudentCosts, least_layers, refuse_budget
from litgpt_akl.training.calibration import ids_in_use, read_held_out, read_samples, remove_layers, score, spread
from litgpt_akl.training.candidate_search import CandidateSearch, Measured, mark_best, table
from litgpt_akl.training.scores import Scores, digest_samples
from litgpt_akl.training.student_making import StudentMaking

HELD_OUT = 48
"""Validation records that candidates are compared by."""


class Choice(NamedTuple):
    """What a student keeps, its sizes, and if calibration records were read, what is known from them."""

    kept: Kept
    sizes: dict[str, int]
    record: dict[str, Any] | None


class Calibration:
    """A teacher, read one block at a time, and what calibration records say of its parts."""

    def __init__(self, making: StudentMaking, teacher: TeacherFiles, longest: int = 1) -> None:
        self.making, self.teacher, config = making, teacher, teacher.config
        of_data = making.data, making.teacher_dir, config
        self.samples = read_samples(*of_data, making.records, making.max_seq_length)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            return_freed_memory()
        dtype = torch.bfloat16 if making.precision == "bf16-true" else torch.float32
        longest = max(longest, *(len(sample.input_ids) for sample in self.samples))
        self.model = LayerwiseModel(config, teacher.weights, device, dtype, longest)
        self.vocab_size = ids_in_use(making.teacher_dir, config)
        self.scores = self._open_scores()
        self.removed: list[Removal] = []
        """One at a time, in order."""

    def _open_scores(self) -> Scores:
        making, identity = self.making, {}
        if making.scores is not None:
            identity = {"teacher": fingerprint(making.teacher_dir), "records": digest_samples(self.samples)}
            identity |= {"precision": making.precision}
        scores = Scores(making.scores, identity)
        if scores.is_read:
            say(f"What is known of the teacher's parts is read from {making.scores}.")
        return scores

    @property
    def importance(self) -> Importance:
        """Of all parts, which are scored when they are first asked for: to remove layers needs no scores."""
        if self.scores.importance is None:
            self.scores.keep_importance(score(self.model, self.samples))
        return self.scores.importance

    def record(self, how: str, sizes: dict[str, int], layers: list[int]) -> dict[str, Any]:
        """For a file: how a student of these layers was chosen, and by what."""
        return {
            "teacher": str(self.making.teacher_dir),
            "method": how,
            "records": len(self.samples),
            "tokens": sum(len(sample.input_ids) for sample in self.samples),
            **({} if self.scores.importance is None else {"block_influence": self.importance.blocks.tolist()}),
            "sizes": sizes,
            **self._measured_of(layers),
            "kept": layers,
        }

    def layers(self, count: int) -> list[int]:
        """Which layers a student of so many keeps, by the method."""
        making, n_layer = self.making, self.teacher.config.n_layer
        if making.method == "even":
            return even_layers(count, n_layer)
        if making.method == "block_influence":
            return influential_layers(self.importance.blocks, count, making.keep_ends)
        some, of_these = self._kl_samples(), (making.kl_records, making.keep_ends)
        self.removed = self.scores.removed(*of_these)
        if len(self.removed) < n_layer - count:
            known, keep = self.removed, partial(self.scores.keep_removed, *of_these)
            self.removed = remove_layers(self.model, some, count, making.keep_ends, self.vocab_size, known, keep)
        return sorted({*range(n_layer)} - {removal.layer for removal in self.removed[: n_layer - count]})

    def _kl_samples(self) -> list[Sample]:
        return [self.samples[number] for number in spread(len(self.samples), self.making.kl_records)]

    def _measured_of(self, layers: list[int]) -> dict[str, Any]:
        """For a file: by what the layers of a student were removed one at a time, if they were."""
        some, removed = self._kl_samples(), self.removed[: self.teacher.config.n_layer - len(layers)]
        if self.making.method != "greedy":
            return {}
        told = {"kl_records": len(some), "kl_response_tokens": sum(len(sample.positions) for sample in some)}
        return {**told, "removed": [removal._asdict() for removal in removed]}


def choose(making: StudentMaking, teacher: TeacherFiles, layers: int | list[int], sizes: dict[str, int]) -> Choice:
    """A student of so many layers, or of those that are named, and of these sizes."""
    n_layer = teacher.config.n_layer
    if making.data is None:
        if isinstance(layers, int):
            if layers < n_layer:
                say(f"{layers} of {n_layer} layers, evenly spread: by --data those that matter most would be found.")
            layers = even_layers(layers, n_layer)
        return Choice(Kept(layers), sizes, None)
    how = "as named" if isinstance(layers, list) else making.method
    count = len(layers) if isinstance(layers, list) else layers
    narrower = "".join(f", {name} {sizes[name]}" for name in making.narrower)
    say(f"{making.teacher_dir}: choosing {count} of {n_layer} layers ({how}){narrower}.")
    calibration = Calibration(making, teacher)
    if isinstance(layers, int):
        layers = calibration.layers(layers)
        if calibration.removed and count < n_layer:
            loss = calibration.removed[n_layer - count - 1].forward_kl
            say(f"Forward KL to the teacher on these records: {loss:.3f} nats a response token.")
    kept = Kept(layers)
    if making.narrower:
        kept = choose_parts(calibration.importance, teacher.config, layers, sizes)
    return Choice(kept, sizes, calibration.record(how, sizes, layers))


def plan_candidates(
    making: StudentMaking, teacher: TeacherFiles, costs: StudentCosts, budget: Budget
) -> list[Candidate]:
    """The students that are to be compared.

    Raises:
        UserError: none is as small as it should be.
    """
    options = {"least": least_layers(making, teacher), "count": making.candidates, "cost": budget.cost}
    with nullcontext() if making.speed is None else costs.progress():
        candidates = form_candidates(teacher.config, teacher.kind, budget.limit, **options)
    if not candidates:
        raise refuse_budget(budget, making, teacher, costs.full)
    if len(candidates) < making.candidates:
        say(f"--candidates {making.candidates}: {teacher.config.name} has {len(candidates)} of that size.")
    return candidates


def choose_candidate(
    making: StudentMaking,
    teacher: TeacherFiles,
    candidates: Sequence[Candidate],
    costs: StudentCosts,
    train: Callable[[Choice], float],
) -> Choice:
    """The candidate that is nearest to the teacher on validation records, of the best few after a few steps."""
    held_out = read_held_out(making.data, making.teacher_dir, teacher.config, HELD_OUT, making.max_seq_length)
    say(f"{making.teacher_dir}: choosing one of {len(candidates)} students, layers by {making.method}.")
    calibration = Calibration(making, teacher, longest=max(len(sample.input_ids) for sample in held_out))
    # all at once: those of deeper students are among them
    calibration.layers(min(candidate.layers for candidate in candidates))
    options = calibration.importance, calibration.layers, held_out, calibration.vocab_size
    search = CandidateSearch(teacher, calibration.model, *options)
    measured = search.measure(candidates)
    of_teacher, speeds = costs.speeds(candidates)
    for each in measured:
        each.set_speed(of_teacher, speeds[candidates.index(each.candidate)])

    def trained(each: Measured) -> float:
        return train(Choice(each.kept, each.candidate.sizes, None))

    chosen = mark_best(measured, making.trial_steps, trained)
    say(table(measured, making.trial_steps))
    say(
        f"> is made. KL: forward KL to the teacher in nats a response token, on {len(held_out)} validation records.\n"
        f"tokens/s: of one answer on this device, ± half the distance between the quartiles of {ROUNDS} measurements."
        f"\nThe teacher has {of_teacher:,.1f} tokens/s."
    )
    sizes, layers = chosen.candidate.sizes, chosen.kept.layers
    record = calibration.record(making.method, sizes, layers)
    record |= {"held_out_records": len(held_out), "trial_steps": making.trial_steps}
    record |= {"teacher_tokens_per_second": of_teacher}
    return Choice(chosen.kept, sizes, {**record, "candidates": [each.record() for each in measured]})
