"""A loss over the student's LM head, block by block: a ``[tokens, vocab]`` tensor for a whole batch never exists.

What scores a block, and turns the student's logits into the gradient of the loss in the place where they lie, is told
by the caller: this is the part that is the same whatever the teacher is. The gradient is carried back through the
student's head before the next block overwrites it. Results are sums over tokens, never means.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

IN_NATS = ("divergence", "forward_kl", "reverse_kl", "cross_entropy", "teacher_cross_entropy")
OF_THE_HEAD = ("h", "h_squared", "head_gap", "tail_gap")
OF_TOP_IDS = ("agreement", "confidence", "accuracy", "teacher_confidence", "teacher_accuracy")
STATISTICS = (*IN_NATS, *OF_THE_HEAD, *OF_TOP_IDS)
"""What is known of each token beside the loss. ``forward_kl`` and ``reverse_kl`` are of both models as they are, at
temperature 1 whatever the objective's is, so that runs can be compared; what is of the head is at the objective's.
``agreement`` is of the two top-1 ids, ``confidence`` is the probability of a model's top-1 id at temperature 1, and
``accuracy`` is whether it is the label."""


_BLOCK_BYTES = {"cpu": 100 * 2**20}
_BLOCK_BYTES_ELSEWHERE = 2**30


def usual_block_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens that go through the heads at a time, of a budget for both models' logits."""
    return max(16, _BLOCK_BYTES.get(device_type, _BLOCK_BYTES_ELSEWHERE) // (2 * 4 * vocab_size))


class HeadLoss(NamedTuple):
    """What a loss over LM heads returns."""

    loss: Tensor
    """Sum over tokens of ``(1 - kd_ratio) * cross-entropy + kd_ratio * divergence`` in nats, with gradients."""
    tokens: int
    """How many labels were not -100."""
    values: dict[str, Tensor]
    """The :data:`STATISTICS` of each token, ``[tokens]`` by name, without gradients."""

    @property
    def stats(self) -> dict[str, Tensor]:
        """The sums of :data:`STATISTICS` over tokens, scalars."""
        return dict(zip(self.values, torch.stack([*self.values.values()]).sum(dim=1).unbind(), strict=True))


class LMHead(NamedTuple):
    """Final hidden states ``[n, d]`` and the head ``[vocab, d]`` that turns them into logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    scales = True

    @property
    def heads(self) -> tuple["LMHead", ...]:
        return (self,)

    def frozen(self, rows: Tensor | None, vocab_size: int, like: Tensor) -> "LMHead":
        dtype = _product_dtype(like)
        hidden = self.hidden if rows is None else self.hidden[rows]
        bias = None if self.bias is None else self.bias.detach()[:vocab_size]
        return LMHead(hidden.detach().to(dtype), self.weight.detach()[:vocab_size].to(dtype), bias, self.softcap)

    def logits_into(self, out: Tensor, rows: slice, temperature: float = 1.0) -> None:
        _product(self.hidden[rows], self.weight.T, out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature != 1.0:
            out.div_(temperature)

    @property
    def allows_all(self) -> bool:
        """Whether no id is forbidden, which only a bias can do; a GPU's is not looked at: the host would wait."""
        return self.bias is None or (not self.bias.is_cuda and bool(self.bias.isfinite().all()))


class TeacherLogits(Protocol):
    """What a loss asks of a teacher; an :class:`LMHead` is the simplest one."""

    heads: Sequence[LMHead]
    """All that it reads."""
    scales: bool
    """Whether its logits at a temperature are those at 1 divided by it."""
    allows_all: bool
    """Whether no id is forbidden."""

    def frozen(self, rows: Tensor | None, vocab_size: int, like: Tensor) -> "TeacherLogits":
        """The same of some rows, None for all: without gradients and padding, in the type of products with ``like``."""

    def logits_into(self, out: Tensor, rows: slice, temperature: float = 1.0) -> None:
        """Write the logits of some rows at a temperature, softcap included, to ``out`` ``[rows, vocab]``."""


Score = Callable[[slice, Tensor, dict[str, Tensor]], None]
"""Fills the :data:`STATISTICS` ``[block]`` of some rows by their names, and where a gradient is wanted turns the
student's logits ``[block, vocab]`` into that of the loss in them as they were before the softcap."""


class Blocks(NamedTuple):
    """How many tokens go through the heads at a time, over how many ids, and what scores them."""

    tokens: int
    vocab_size: int
    """Ids from here on are padding and get no mass."""
    kd_ratio: float
    """Share of the divergence in the loss."""
    make_score: Callable[[LMHead, Tensor, list[slice], bool], Score]
    """Takes the student's head, a block ``[block, vocab]`` such as will be scored, the rows of all blocks, and whether
    a gradient is wanted."""


def blockwise_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, labels: Tensor, blocks: Blocks
) -> HeadLoss:
    """The loss of the student's final hidden states ``[n, d]``, with gradients in them and in its head ``[v, d]``.

    ``labels`` ``[n]`` are the ids that follow each position; all of them count.
    """
    dtype = _product_dtype(hidden)
    student = hidden.to(dtype), weight.to(dtype), bias
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, values = _BlockwiseLoss.apply(*student, softcap, len(labels), wanted, blocks)
    return HeadLoss(loss, len(labels), dict(zip(STATISTICS, values.unbind(), strict=True)))


class _BlockwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, count: int, wanted, blocks: Blocks):
        vocab_size = blocks.vocab_size
        student = LMHead(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size], softcap)
        gradients = _Gradients.like(student, wanted, len(weight), empty=count == 0)
        values = torch.empty(len(STATISTICS), count, dtype=gradients.dtype, device=hidden.device)
        by_name = dict(zip(STATISTICS, values.unbind(), strict=True))
        size = math.ceil(count / max(1, math.ceil(count / blocks.tokens)))
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size or 1)]
        buffer = torch.empty(size, vocab_size, dtype=gradients.dtype, device=hidden.device)
        score = blocks.make_score(student, buffer, parts, any(wanted))
        for rows in parts:
            logits = buffer[: rows.stop - rows.start]
            student.logits_into(logits, rows)
            score(rows, logits, {name: value[rows] for name, value in by_name.items()})
            gradients.add(logits, student, rows)
        ctx.gradients, ctx.inputs = gradients, (hidden, weight, bias)
        ctx.mark_non_differentiable(values)
        return _weighted(blocks.kd_ratio, by_name["divergence"].sum(), by_name["cross_entropy"].sum()), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed out; call the loss again")
        # the loss may outlive its backward; what it was computed from need not
        gradients, inputs, ctx.gradients, ctx.inputs = ctx.gradients, ctx.inputs, None, None
        return *gradients.scaled(grad_output, inputs), *[None] * 4


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
    def like(cls, student: LMHead, wanted: tuple[bool, bool, bool], width: int, empty: bool) -> "_Gradients":
        dtype = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
        vocab_size, device = len(student.weight), student.hidden.device
        hidden = torch.empty(student.hidden.shape, dtype=dtype, device=device) if wanted[0] else None
        weight = torch.empty(width, student.weight.size(1), dtype=dtype, device=device) if wanted[1] else None
        if weight is not None:
            # the first block overwrites its part, so only ids without a token of their own are cleared
            weight[0 if empty else vocab_size :].zero_()
        bias = torch.zeros(width, dtype=dtype, device=device) if wanted[2] else None
        return cls(hidden, weight, bias, dtype)

    def add(self, logits_gradient: Tensor, student: LMHead, rows: slice) -> None:
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


def blockwise_surprisal(student: LMHead, ids: Tensor, *, whole_set: bool, vocab_size: int, block_tokens: int) -> Tensor:
    """``-log`` of the probability of an id at each position, or of a set of ids, ``[n]`` in nats, with gradients.

    Args:
        student: of any model; its head may be a teacher's, for which no gradient is wanted.
        ids: ``[n]``, one for each position; or with ``whole_set`` ``[s]``, of which any may follow.
        whole_set: whether ``ids`` are one set for all positions.
        vocab_size: ids from here on are padding and get no mass.
        block_tokens: positions that go through the head at a time.
    """
    hidden, weight, bias, softcap = student
    dtype = _product_dtype(hidden)
    given = hidden.to(dtype), weight.to(dtype), bias
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in given)
    with torch.autocast(hidden.device.type, enabled=False):
        return _BlockwiseSurprisal.apply(*given, softcap, ids, whole_set, vocab_size, block_tokens, wanted)


class _BlockwiseSurprisal(torch.autograd.Function):
    """Goes through the head once more in the backward, since what a surprisal weighs is known only then."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, ids, whole_set, vocab_size, block_tokens, wanted):
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.options = softcap, whole_set, vocab_size, block_tokens, wanted
        values = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        head = LMHead(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size], softcap)
        for rows, logits in _logits_of_blocks(head, block_tokens):
            of = logits[:, ids].logsumexp(dim=-1) if whole_set else logits.gather(-1, ids[rows, None])[:, 0]
            values[rows] = logits.logsumexp(dim=-1) - of
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        hidden, weight, bias, ids = ctx.saved_tensors
        softcap, whole_set, vocab_size, block_tokens, wanted = ctx.options
        student = LMHead(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size], softcap)
        gradients = _Gradients.like(student, wanted, len(weight), empty=len(hidden) == 0)
        for rows, logits in _logits_of_blocks(student, block_tokens):
            weights = grad_output[rows, None]
            gradient = logits.softmax(dim=-1).mul_(weights)
            if whole_set:
                gradient.index_add_(1, ids, logits[:, ids].softmax(dim=-1).mul_(-weights))
            else:
                gradient.scatter_add_(1, ids[rows, None], -weights)
            if softcap is not None:
                gradient.mul_(1 - (logits / softcap).square_())
            gradients.add(gradient, student, rows)
        given = zip(gradients[:3], (hidden, weight, bias), strict=True)
        return *(None if total is None else total.to(of.dtype) for total, of in given), *[None] * 6


def _logits_of_blocks(head: LMHead, block_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits ``[block, vocab]`` in memory that the next block overwrites."""
    count, dtype = len(head.hidden), torch.promote_types(head.hidden.dtype, torch.float32)
    buffer = torch.empty(min(block_tokens, count), len(head.weight), dtype=dtype, device=head.hidden.device)
    for start in range(0, count, block_tokens):
        rows = slice(start, min(start + block_tokens, count))
        logits = buffer[: rows.stop - rows.start]
        head.logits_into(logits, rows)
        yield rows, logits
