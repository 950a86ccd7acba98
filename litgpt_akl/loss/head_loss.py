"""The distillation loss over two LM heads, block by block: a ``[tokens, vocab]`` tensor for a whole batch never exists.

Each block of tokens goes through both heads, its loss and the gradient of its logits are formed at once in two buffers
that are allocated once, and the gradient is carried back through the student's head before the next block overwrites
them. Results are sums over tokens, never means.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.objective import Objective
from litgpt_akl.loss.scoring import STATISTICS, Scorer, can_compile

IGNORE_INDEX = -100

_BLOCK_BYTES = {"cpu": 100 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 2**30


class HeadLoss(NamedTuple):
    """What :class:`DistillationLoss` returns."""

    loss: Tensor
    """Sum over tokens of ``(1 - kd_ratio) * cross-entropy + kd_ratio * divergence`` in nats, with gradients."""
    tokens: int
    """How many labels were not -100."""
    values: Tensor
    """``[len(STATISTICS), tokens]``: the :data:`STATISTICS` of each token, without gradients."""

    @property
    def stats(self) -> dict[str, Tensor]:
        """The sums of :data:`STATISTICS` over tokens, scalars."""
        return dict(zip(STATISTICS, self.values.sum(dim=1).unbind(), strict=True))


class _Head(NamedTuple):
    """Final hidden states ``[n, d]`` and the head ``[vocab, d]`` that turns them into logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def logits_into(self, out: Tensor, rows: slice) -> None:
        _product(self.hidden[rows], self.weight.T, out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class DistillationLoss(Objective):
    """Cross-entropy and a divergence to the teacher over two LM heads, exact, in memory that does not grow with tokens.

    Sources: arXiv 2404.02657 for the adaptive divergence, and those that :mod:`litgpt_akl.loss.divergences` names; all
    sums are in float32 (float64 when given float64).
    """

    block_tokens: int | None = None
    """Tokens that go through the heads at a time; None chooses from a budget for both models' logits, 100 MiB on a CPU
    and 1 GiB elsewhere."""
    compile: bool | None = None
    """Whether torch.compile fuses the element-wise part; None: on a GPU, if there is a compiler for it. On a CPU it is
    as fast without, in tiles that stay in the cache, and needs no compilation for every kind of tile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {self.block_tokens}")

    def __call__(
        self,
        student_hidden: Tensor,
        student_head_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_head_weight: Tensor,
        labels: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        all_count: bool = False,
    ) -> HeadLoss:
        """Sum the loss over the tokens whose label is not -100.

        Args:
            student_hidden: final hidden states of the student, ``[n, d]``.
            student_head_weight: the student's LM head, ``[v, d]``.
            teacher_hidden: final hidden states of the teacher, ``[n, D]``; no gradient.
            teacher_head_weight: the teacher's LM head, ``[v', D]``; no gradient.
            labels: ``[n]``, the id that follows each position, or -100.
            student_bias: ``[v]``.
            teacher_bias: ``[v']``.
            student_softcap: the student's ``final_logit_softcapping``.
            teacher_softcap: the teacher's ``final_logit_softcapping``.
            vocab_size: ids from here on are padding and get no mass; default: the narrower of the two heads.
            all_count: promises that no label is -100; to look would let the host wait for a GPU.

        Raises:
            ValueError: shapes that do not fit, or a label at or above ``vocab_size``.
        """
        if vocab_size is None:
            vocab_size = min(len(student_head_weight), len(teacher_head_weight))
        _check(student_hidden, student_head_weight, teacher_hidden, teacher_head_weight, labels, vocab_size)
        rows = None if all_count else (labels != IGNORE_INDEX).nonzero()[:, 0]
        if rows is not None and len(rows) < len(labels):
            student_hidden, teacher_hidden, labels = student_hidden[rows], teacher_hidden[rows], labels[rows]
        dtype = _product_dtype(student_hidden)
        student = student_hidden.to(dtype), student_head_weight.to(dtype), student_bias
        teacher = _Head(
            teacher_hidden.detach().to(dtype),
            teacher_head_weight.detach()[:vocab_size].to(dtype),
            None if teacher_bias is None else teacher_bias.detach()[:vocab_size],
            teacher_softcap,
        )
        wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student)
        with torch.autocast(student_hidden.device.type, enabled=False):
            loss, values = _BlockwiseLoss.apply(*student, teacher, student_softcap, labels, wanted, self)
        return HeadLoss(loss, len(labels), values)

    def tokens_per_block(self, vocab_size: int, device_type: str) -> int:
        """How many tokens go through the heads at a time."""
        if self.block_tokens is not None:
            return self.block_tokens
        budget = _BLOCK_BYTES.get(device_type, _BLOCK_BYTES_ELSEWHERE)
        return max(16, budget // (2 * 4 * vocab_size))

    def compiles_on(self, device_type: str) -> bool:
        """Whether torch.compile fuses the element-wise part there."""
        wanted = device_type != "cpu" if self.compile is None else self.compile
        return wanted and can_compile(device_type)


class _BlockwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher: _Head, softcap, labels, wanted, options: DistillationLoss):
        vocab_size, device = len(teacher.weight), hidden.device.type
        student = _Head(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size], softcap)
        gradients = _Gradients.like(student, wanted, len(weight), empty=len(labels) == 0)
        dtype = gradients.dtype
        stats = torch.empty(len(STATISTICS), len(labels), dtype=dtype, device=hidden.device)
        blocks = max(1, math.ceil(len(labels) / options.tokens_per_block(vocab_size, device)))
        size = math.ceil(len(labels) / blocks)
        # two tensors, not one: torch.compile mistakes what is written to a part of a tensor that is also read
        buffers = [torch.empty(size, vocab_size, dtype=dtype, device=hidden.device) for _ in range(2)]
        score = Scorer(
            options,
            buffers[0],
            softcap=softcap,
            finite=all(_allows_all(head.bias) for head in (student, teacher)),
            compiled=options.compiles_on(device),
            want_gradient=any(wanted),
        )
        for start in range(0, len(labels), size or 1):
            rows = slice(start, min(start + size, len(labels)))
            student_logits, teacher_logits = (buffer[: rows.stop - rows.start] for buffer in buffers)
            student.logits_into(student_logits, rows)
            teacher.logits_into(teacher_logits, rows)
            score(teacher_logits, student_logits, labels[rows], stats[:, rows])
            gradients.add(student_logits, student, rows)
        ctx.gradients, ctx.inputs = gradients, (hidden, weight, bias)
        divergence, cross_entropy = (stats[STATISTICS.index(name)].sum() for name in ("divergence", "cross_entropy"))
        ctx.mark_non_differentiable(stats)
        return _weighted(options.kd_ratio, divergence, cross_entropy), stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed out; call the loss again")
        # the loss may outlive its backward; what it was computed from need not
        gradients, inputs, ctx.gradients, ctx.inputs = ctx.gradients, ctx.inputs, None, None
        return *gradients.scaled(grad_output, inputs), None, None, None, None, None


def _weighted(kd_ratio: float, divergence: Tensor, cross_entropy: Tensor) -> Tensor:
    """The loss of two sums; a term without weight counts nothing even if infinite."""
    if kd_ratio in (0.0, 1.0):
        return (divergence if kd_ratio == 1.0 else cross_entropy).clone()
    return kd_ratio * divergence + (1 - kd_ratio) * cross_entropy


class _Gradients(NamedTuple):
    """Gradients of a sum of losses in the student's hidden states, head and bias; None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def like(cls, student: _Head, wanted: tuple[bool, bool, bool], width: int, empty: bool) -> "_Gradients":
        dtype = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
        vocab_size, device = len(student.weight), student.hidden.device
        hidden = torch.empty(student.hidden.shape, dtype=dtype, device=device) if wanted[0] else None
        weight = torch.empty(width, student.weight.size(1), dtype=dtype, device=device) if wanted[1] else None
        if weight is not None:
            # the first block overwrites its part, so only ids without a token of their own are cleared
            weight[0 if empty else vocab_size :].zero_()
        bias = torch.zeros(width, dtype=dtype, device=device) if wanted[2] else None
        return cls(hidden, weight, bias, dtype)

    def add(self, logits_gradient: Tensor, student: _Head, rows: slice) -> None:
        """Carry the gradient of one block's logits ``[block, vocab]`` back through the student's head."""
        vocab_size = len(student.weight)
        if self.bias is not None:
            self.bias[:vocab_size] += logits_gradient.sum(dim=0)
        logits_gradient = logits_gradient.to(student.weight.dtype)
        if self.hidden is not None:
            _product(logits_gradient, student.weight, self.hidden[rows])
        if self.weight is not None:
            total, hidden = self.weight[:vocab_size], student.hidden[rows]
            _product(logits_gradient.T, hidden, total, add=rows.start > 0)

    def scaled(self, factor: Tensor, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients times ``factor``, in place, in the dtypes of their inputs."""
        pairs = zip(self[:3], inputs, strict=True)
        return tuple(None if total is None else total.mul_(factor).to(given.dtype) for total, given in pairs)


def _check(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, vocab_size: int) -> None:
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.shape != (len(labels), weight.size(1)):
            raise ValueError(
                f"{name}_hidden must be [{len(labels)} labels, {weight.size(1)}], got {list(hidden.shape)}"
            )
        if vocab_size > len(weight):
            raise ValueError(f"vocab_size {vocab_size} is above the {len(weight)} ids of the {name}'s head")
    if not labels.is_cuda and len(labels) and int(labels.max()) >= vocab_size:
        raise ValueError(f"label {int(labels.max())} lies outside the {vocab_size} ids that both heads have")


def _allows_all(bias: Tensor | None) -> bool:
    """Whether no id is forbidden, which only a bias can do; a GPU's is not looked at, since the host would wait."""
    return bias is None or (not bias.is_cuda and bool(bias.isfinite().all()))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """CUDA multiplies in half precision and sums in float32; elsewhere the operands themselves become float32."""
    if hidden.is_cuda and sums_in_float32(hidden.device):
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return torch.promote_types(hidden.dtype, torch.float32)


@cache
def sums_in_float32(device: torch.device) -> bool:
    """Whether matrices of bfloat16 have products in float32 there, which PyTorch 2.8 brought to CUDA, not to ROCm.

    Where they have not, a warning says that the loss multiplies in float32, which is exact and slower.
    """
    half, total = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.mm(half, half, out_dtype=torch.float32, out=total)
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        warnings.warn(
            f"On {device} PyTorch {torch.__version__} has no products of bfloat16 matrices in float32 ({reason}).\n"
            "The LM heads multiply in float32, which is slower and takes a float32 copy of both.",
            stacklevel=2,
        )
        return False
    return True


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """``out = left @ right``, or ``out += left @ right``, with ``out`` in float32 for operands of half precision."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=1 if add else 0)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
