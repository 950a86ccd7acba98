"""A divergence of the user's own: a function of two tiles of logits, found by its import path."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from litgpt_akl.loss.closed_forms import Slope
from litgpt_akl.loss.comparison import NO_SCRATCH, Comparison, Scratch
from litgpt_akl.messages import UserError, reason


class OwnDivergence:
    """Calls ``function(teacher_logits, student_logits) -> [n]`` on a tile ``[n, vocab]``, and autograd within the tile.

    Args:
        path: under which the function was found.
        function: see above; differentiable in its second argument.
    """

    def __init__(self, path: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.path, self.function, self.checked = path, function, False

    def __call__(
        self,
        teacher_logits: Tensor,
        student_logits: Tensor,
        comparison: Comparison,
        *,
        finite: bool = False,
        scratch: Scratch = NO_SCRATCH,
    ) -> Slope:
        """Value and gradient of a tile, as a closed form gives them.

        Raises:
            UserError: the function gives something else than a number for each row, is not differentiable, or, when it
                is first called, is not finite where student and teacher are equal.
        """
        if not self.checked:
            self._check_equality(teacher_logits[comparison.teacher_log_sum.isfinite()])
        value, pull = self._differentiate(teacher_logits, student_logits)
        student = torch.sub(student_logits, comparison.student_log_sum[:, None], out=scratch[0]).exp_()
        return Slope(value, pull, torch.zeros_like(value), student)

    def _differentiate(self, teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_()
            value = self.function(teacher_logits.detach(), leaf)
            rows = leaf.shape[:1]
            if not isinstance(value, Tensor) or value.shape != rows:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"--distill.divergence {self.path} must give one number for each row of its logits"
                    f" {list(leaf.shape)}, a tensor {list(rows)}; it gave {found}."
                )
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise UserError(
                f"--distill.divergence {self.path} does not depend on the student's logits, its second argument, in a"
                " way that can be differentiated."
            )
        # an expanded one cannot be written to
        return value.detach().to(leaf.dtype), gradient.contiguous()

    def _check_equality(self, logits: Tensor) -> None:
        if len(logits) == 0:
            return
        for what, result in zip(("value", "gradient"), self._differentiate(logits, logits), strict=True):
            if not result.isfinite().all():
                raise UserError(
                    f"--distill.divergence {self.path} has a {what} that is not finite where the student's logits equal"
                    " the teacher's. Logits may be -inf, and a gradient must not be 0 times infinity."
                )
        self.checked = True


@cache
def own_divergence(path: str) -> OwnDivergence:
    """Import the function that ``path``, such as ``my.module.function``, names.

    Raises:
        ValueError: it cannot be imported, or cannot be called.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"divergence {path} cannot be imported: {reason(error)}. Modules are looked for where Python looks for"
            " them, such as in the folders of PYTHONPATH."
        ) from error
    if not callable(function):
        raise ValueError(
            f"divergence {path} must be a function of two blocks of logits, got a {type(function).__name__}"
        )
    return OwnDivergence(path, function)
