"""A student and several teachers that have its tokenizer, and several teachers as one model with one head."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from litgpt_akl.loss.mixture import Mixture
from litgpt_akl.models.gpt import Head
from litgpt_akl.models.pair import Models, Pair, check_pair, find_models


def check_pairs(
    student_dir: Path,
    teacher_dirs: Sequence[Path],
    access_token: str | None,
    weights_needed: Sequence[bool],
    **options,
) -> Pair:
    """The student with its first teacher, and with each of the others, over the ids that all have.

    ``options`` and errors are those of :func:`~litgpt_akl.models.pair.check_pair`, whichever teacher does not fit.
    """
    wanted = zip(teacher_dirs, weights_needed, strict=True)
    found = [check_pair(student_dir, directory, access_token, needed, **options) for directory, needed in wanted]
    vocab_size = min(pair.vocab_size for pair in found)
    first, *others = (replace(pair, vocab_size=vocab_size) for pair in found)
    notes = dict.fromkeys(note for pair in found for note in pair.notes)
    return replace(first, notes=tuple(notes), others=tuple(others))


def find_models_of(student_dir: Path, teacher_dirs: Sequence[Path], pair: Pair | None = None) -> Models:
    """What :func:`~litgpt_akl.models.pair.find_models` finds of a student with its first teacher, and of the others."""
    pairs = [None] * len(teacher_dirs) if pair is None else pair.of_each
    found = [find_models(student_dir, directory, of) for directory, of in zip(teacher_dirs, pairs, strict=True)]
    vocab_size = min(models.vocab_size for models in found)
    first, *others = (models._replace(vocab_size=vocab_size) for models in found)
    return first._replace(others=tuple(others))


class MixedHead:
    """The LM heads of several teachers, to be read as that of one."""

    def __init__(self, heads: Sequence[Head], weights: Sequence[float]) -> None:
        self.heads, self.weights = heads, weights

    def at(self, hidden: Sequence[Tensor]) -> Mixture:
        """What the loss asks of the mixture where the teachers have these hidden states, ``[n, D_i]`` each."""
        return Mixture([head.at(of) for head, of in zip(self.heads, hidden, strict=True)], self.weights)

    def logits(self, hidden: Sequence[Tensor], vocab_size: int, temperature: float) -> Tensor:
        """``[n, vocab_size]``, which divided by the temperature are the mixture's at it."""
        mixture = self.at(hidden).frozen(None, vocab_size, like=hidden[0].float())
        out = hidden[0].new_empty(len(hidden[0]), vocab_size, dtype=torch.float32)
        mixture.logits_into(out, slice(0, len(out)), temperature)
        return out.mul_(temperature)


def each_model(teacher: nn.Module) -> list[nn.Module]:
    """The models of a mixture of teachers; a single one is all there is."""
    return [*getattr(teacher, "roots", [teacher])]


class TeacherMixture(nn.Module):
    """Several teachers, each sharded by itself, whose distributions are averaged."""

    def __init__(self, teachers: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.roots = nn.ModuleList(teachers)
        self.lm_head = MixedHead([teacher.lm_head for teacher in teachers], weights)
