"""A teacher's distribution in little space: its k most probable ids, and all others as one.

The k + 1 probabilities sum to one. What the others are among themselves is lost; that it is little is for the caller to
measure. Forward and reverse KL of such distributions are at most those of the whole ones, by the data-processing
inequality.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_akl.loss.blockwise import LMHead, usual_block_tokens
from litgpt_akl.loss.comparison import compare
from litgpt_akl.messages import UserError


class Ranked(NamedTuple):
    """Distributions as they are read."""

    ids: Tensor
    """``[n, k]``, the most probable one first."""
    log_p: Tensor
    """``[n, k + 1]``: logarithms of the probabilities of these ids, and of all others together."""
    label_log_p: Tensor
    """``[n]``: that of the label, which need not be among the ids."""


class TopK(NamedTuple):
    """How distributions lie in bytes: each row has the ids, log-probabilities in float16, the label's in float32.

    Rounded to 11 bits, a logarithm errs by 1/2048 of itself at most. The k + 1 numbers are scaled to a sum of one when
    they are read, so that what it costs in KL is of second order.
    """

    k: int
    vocab_size: int
    """Ids from here on are padding and get no mass."""

    @classmethod
    def of(cls, rows: Tensor, vocab_size: int) -> "TopK":
        """That of rows ``[n, bytes]``, whose k follows from their length."""
        return cls((rows.size(1) - 2 - 4) // (_id_bytes(vocab_size) + 2), vocab_size)

    @property
    def bytes_of_token(self) -> int:
        """Of a row."""
        return self.k * _id_bytes(self.vocab_size) + 2 * (self.k + 1) + 4

    def pack(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Rows ``[n, bytes]`` in uint8 of a teacher's logits ``[n, vocab]`` at temperature 1, which are lost.

        ``labels`` ``[n]`` are the ids that follow.
        """
        label = logits.gather(-1, labels[:, None])
        ids = logits.topk(self.k, dim=-1).indices
        lumped = lump(logits, ids).logits
        log_sum = lumped.logsumexp(dim=-1, keepdim=True)
        shifts = torch.arange(0, 8 * _id_bytes(self.vocab_size), 8, device=ids.device)
        packed = ids[..., None].bitwise_right_shift(shifts).bitwise_and(255).to(torch.uint8).flatten(1)
        numbers = (lumped - log_sum).half(), (label - log_sum).float()
        return torch.cat([packed, *(each.contiguous().view(torch.uint8) for each in numbers)], dim=1)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Ranked:
        """What :meth:`pack` was given, with logarithms in a type; NaN where a logit was NaN."""
        ids, log_p, label = rows.split([self.k * _id_bytes(self.vocab_size), 2 * (self.k + 1), 4], dim=1)
        places = ids.view(len(rows), self.k, -1).long()
        shifts = torch.arange(0, 8 * places.size(-1), 8, device=rows.device)
        # copies, since numbers must lie at multiples of their size
        log_p, label = (each.clone(memory_format=torch.contiguous_format) for each in (log_p, label))
        log_p = log_p.view(torch.float16).to(dtype)
        log_p = log_p - log_p.logsumexp(dim=-1, keepdim=True)
        label_log_p = label.view(torch.float32)[:, 0].to(dtype)
        return Ranked(places.bitwise_left_shift(shifts).sum(dim=-1), log_p, label_log_p)

    def forward_kl(self, rows: Tensor, logits: Tensor) -> Tensor:
        """KL ``[n]`` from the distributions in rows to those of logits ``[n, vocab]``, which are lost."""
        known = self.unpack(rows, logits.dtype)
        return compare(known.log_p, lump(logits, known.ids).logits).forward_kl

    def dense(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Logarithms ``[n, vocab]`` in float32, for a picture: the others share evenly what the label leaves them."""
        known = self.unpack(rows, torch.float32)
        of_label, others = known.label_log_p.exp(), known.log_p[:, -1].exp()
        is_kept = (known.ids == labels[:, None]).any(dim=-1)
        left, count = torch.where(is_kept, others, others - of_label), self.vocab_size - self.k - (~is_kept).float()
        share = (left.clamp(min=0.0) / count.clamp(min=1.0)).log()
        found = share[:, None].repeat(1, self.vocab_size).scatter_(-1, labels[:, None], known.label_log_p[:, None])
        return found.scatter_(-1, known.ids, known.log_p[:, :-1])


def k_of(name: str | None) -> int | None:
    """How many ids a name such as ``topk:64`` means; None if it means anything else."""
    found = re.fullmatch(r"topk:([1-9]\d{0,8})", name or "")
    return None if found is None else int(found[1])


def find_top_k(name: str | None, vocab_size: int) -> TopK | None:
    """What a name such as ``topk:64`` means for so many ids; None for the name of anything else.

    Raises UserError if there are not more than k ids.
    """
    k = k_of(name)
    if k is not None and k >= vocab_size:
        raise UserError(
            f"--teacher.cache_dtype {name}: teacher and student share {vocab_size:,} ids, and at least one must be left"
            f" to the others.\nGive topk:{min(64, vocab_size - 1)}, or leave it out to keep hidden states."
        )
    return None if k is None else TopK(k, vocab_size)


def is_packed(teacher: Tensor | Sequence[Tensor]) -> bool:
    """Whether what a teacher has said of tokens are rows of :meth:`TopK.pack`, and not hidden states."""
    return isinstance(teacher, Tensor) and teacher.dtype == torch.uint8


@torch.no_grad()
def pack_head(teacher: LMHead, labels: Tensor, top_k: TopK) -> Tensor:
    """Rows ``[n, bytes]`` of a teacher's final hidden states ``[n, D]``, its head read a block of tokens at a time."""
    device, vocab_size = teacher.hidden.device, top_k.vocab_size
    teacher = teacher.frozen(None, vocab_size, like=teacher.hidden)
    dtype = torch.promote_types(teacher.hidden.dtype, torch.float32)
    count, most = len(labels), usual_block_tokens(vocab_size, device.type)
    buffer = torch.empty(min(count, most), vocab_size, dtype=dtype, device=device)
    rows = torch.empty(count, top_k.bytes_of_token, dtype=torch.uint8, device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, count, most):
            part = slice(start, min(start + most, count))
            logits = buffer[: part.stop - start]
            teacher.logits_into(logits, part)
            rows[part] = top_k.pack(logits, labels[part])
    return rows


def _id_bytes(vocab_size: int) -> int:
    return -(-(vocab_size - 1).bit_length() // 8)


class Lumped(NamedTuple):
    """Logits with all ids but some put together."""

    logits: Tensor
    """``[n, k + 1]``: of the ids, and of all others as one."""
    largest: Tensor
    """``[n]``: the largest logit among the others."""
    total: Tensor
    """``[n]``: what the exponentials, that are in the place of the others' logits, sum to; at least 1."""


def lump(logits: Tensor, ids: Tensor) -> Lumped:
    """Put all ids but ``ids`` ``[n, k]`` together. The others' mass is summed itself, however small or large it is.

    Logits ``[n, vocab]`` become ``exp(logit - largest)``, and 0 at the ids.
    """
    top = logits.gather(-1, ids)
    largest = logits.scatter_(-1, ids, -torch.inf).amax(dim=-1)
    # where all others are forbidden nothing must become NaN
    shift = largest.clamp(min=torch.finfo(logits.dtype).min)
    total = logits.sub_(shift[:, None]).exp_().sum(dim=-1)
    others = torch.where(total > 0, shift + total.log(), -torch.inf)
    # a NaN must show
    others = torch.where(total.isnan(), total, others)
    return Lumped(torch.cat([top, others[:, None]], dim=1), largest, total.clamp(min=1.0))
