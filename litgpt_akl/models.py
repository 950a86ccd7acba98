"""Student and teacher: LitGPT's GPT with an LM head that can also hand over hidden states or give the loss.

GPT's forward ends in ``lm_head``, so what the head returns is what the model returns. The head is asked from outside,
for one call at a time; its parameters keep their names, and they are read inside the model's own forward.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.config import Config
from litgpt.model import GPT, do_softcapping
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litgpt_akl.errors import UserError
from litgpt_akl.head_loss import DistillationLoss, HeadLoss
from litgpt_akl.sharding import reshard


class DistillationHead(nn.Linear):
    """An LM head that gives logits, softcap included, or for the length of a `giving` block something else."""

    softcap: float | None = None
    _give: Callable[["DistillationHead", Tensor], Any] | None = None

    def forward(self, hidden: Tensor) -> Any:
        if self._give is not None:
            return self._give(self, hidden)
        logits = super().forward(hidden)
        return logits if self.softcap is None else do_softcapping(logits, self.softcap)

    @contextmanager
    def giving(self, give: Callable[["DistillationHead", Tensor], Any]) -> Iterator[None]:
        """The model returns ``give(head, hidden)`` with the final hidden states ``[batch, time, n_embd]``."""
        self._give = give
        try:
            yield
        finally:
            self._give = None


def build_model(config: Config, tied: bool) -> GPT:
    """A GPT with a :class:`DistillationHead`; tied, embeddings and head are one parameter."""
    model = GPT(config)
    head = DistillationHead(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
    head.softcap = config.final_logit_softcapping
    model.lm_head = head
    # the softcap has moved into the head: GPT must not apply it to what the head gives
    model.config = copy(config)
    model.config.final_logit_softcapping = None
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def is_tied(checkpoint_dir: Path, weights: dict[str, Tensor], wish: bool | None) -> bool:
    """Whether embeddings and LM head are one matrix: as told, else if they are equal and config.json does not deny it.

    LitGPT writes both matrices whether they are tied or not, so the weights themselves decide.

    Raises:
        UserError: told to tie matrices that differ: one of them would be thrown away.
    """
    head, embeddings = weights["lm_head.weight"], weights["transformer.wte.weight"]
    equal = torch.equal(head, embeddings)
    if wish and not equal:
        raise UserError(
            f"--train.tie_embeddings true, but in {checkpoint_dir} the LM head and the embeddings differ: one of them"
            " would be thrown away.\nLeave the option out."
        )
    if wish is not None:
        return wish
    config_path = checkpoint_dir / "config.json"
    hf_config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    return equal and hf_config.get("tie_word_embeddings") is not False


def compile_blocks(model: GPT) -> None:
    """Let torch.compile fuse what is in a block; generation, where shapes change at each token, stays eager."""
    for block in model.transformer.h:
        block.forward = _unless_generating(block, torch.compile(block.forward), block.forward)


def _unless_generating(block: nn.Module, compiled: Callable, eager: Callable) -> Callable:
    def forward(*args, **kwargs):
        return (eager if block.attn.kv_cache is not None else compiled)(*args, **kwargs)

    return forward


def checkpoint_activations(model: GPT) -> None:
    """Keep only the input of each block for the backward, which runs the block once more."""
    for block in model.transformer.h:
        # a wrapper module would give the parameters other names
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def set_up_teacher(fabric: L.Fabric, teacher: GPT, dtype: torch.dtype) -> GPT:
    """Freeze a teacher, in a dtype that has nothing to do with what the student trains in, and shard it.

    It is not wrapped by Fabric, whose precision is the student's.
    """
    teacher.requires_grad_(False).eval()
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    teacher = fabric.strategy.setup_module(teacher)
    fabric.strategy.module_to_device(teacher)
    return teacher


def hidden_states(teacher: nn.Module, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The teacher's final hidden states ``[n, D]`` at flat ``positions`` ``[n]`` of ``input_ids`` ``[batch, time]``."""
    with torch.no_grad(), teacher.lm_head.giving(lambda head, hidden: hidden.flatten(0, 1)[positions]):
        return teacher(input_ids)


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    loss: DistillationLoss,
    input_ids: Tensor,
    positions: Tensor,
    labels: Tensor,
    vocab_size: int,
) -> HeadLoss:
    """The loss of one micro-batch, computed inside the student's forward.

    Args:
        student: as Fabric set it up.
        teacher: from :func:`set_up_teacher`.
        loss: what to compute.
        input_ids: ``[batch, time]``.
        positions: ``[n]``, flat positions in ``input_ids`` whose next token is a response token.
        labels: ``[n]``, those next tokens.
        vocab_size: ids that tokenizer and both heads have.
    """
    teacher_hidden, teacher_head = hidden_states(teacher, input_ids, positions), teacher.lm_head

    def give(head: DistillationHead, hidden: Tensor) -> HeadLoss:
        return loss(
            hidden.flatten(0, 1)[positions],
            head.weight,
            teacher_hidden,
            teacher_head.weight,
            labels,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            student_softcap=head.softcap,
            teacher_softcap=teacher_head.softcap,
            vocab_size=vocab_size,
        )

    with student.lm_head.giving(give):
        result = student(input_ids)
    reshard(teacher)
    return result
