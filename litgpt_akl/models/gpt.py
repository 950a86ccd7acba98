"""Student and teacher: LitGPT's GPT with an LM head that can also hand over hidden states or give the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path

import lightning as L
import torch
from litgpt import lora
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litgpt_akl.loss.head_loss import DistillationLoss, HeadLoss
from litgpt_akl.messages import UserError
from litgpt_akl.models.heads import DistillationHead, Head, LoRAHead
from litgpt_akl.models.lora import without_adapters
from litgpt_akl.models.parallel import reshard
from litgpt_akl.models.weights import is_said_to_be_tied


def build_model(config: Config, tied: bool) -> GPT:
    """A GPT with a :class:`Head`; tied, embeddings and head are one parameter.

    With LitGPT's configuration for LoRA it has adapters, and only they are trained.
    """
    with_lora = isinstance(config, lora.Config)
    model = (lora.GPT if with_lora else GPT)(config)
    model.lm_head = head = make_head(config)
    # the softcap has moved into the head: GPT must not apply it to what the head gives
    model.config = copy(config)
    model.config.final_logit_softcapping = None
    if tied:
        model.transformer.wte.weight = head.weight
    if with_lora:
        lora.mark_only_lora_as_trainable(model)
    return model


def make_head(config: Config) -> Head:
    """A model's LM head, with its adapter if the configuration has one there."""
    sizes = config.n_embd, config.padded_vocab_size
    if getattr(config, "lora_head", False):
        adapter = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        head = LoRAHead(*sizes, **adapter, bias=config.lm_head_bias)
    else:
        head = DistillationHead(*sizes, bias=config.lm_head_bias)
    head.softcap = config.final_logit_softcapping
    return head


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
    return equal and is_said_to_be_tied(checkpoint_dir) is not False


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


@contextmanager
def empty_weights(fabric: L.Fabric, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Models that are built have no weights yet; they have the student's dtype, or another one."""
    previous = torch.get_default_dtype()
    with fabric.init_module(empty_init=True):
        torch.set_default_dtype(dtype or torch.get_default_dtype())
        try:
            yield
        finally:
            torch.set_default_dtype(previous)


def set_up_teacher(fabric: L.Fabric, teacher: nn.Module) -> nn.Module:
    """Freeze a teacher, or its head alone, and shard it. Fabric, whose precision is the student's, does not wrap it."""
    teacher.requires_grad_(False).eval()
    teacher = fabric.strategy.setup_module(teacher)
    fabric.strategy.module_to_device(teacher)
    return teacher


def hidden_states(teacher: nn.Module, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The teacher's final hidden states ``[n, D]`` at flat ``positions`` ``[n]`` of ``input_ids`` ``[batch, time]``.

    A model with adapters teaches as its base, without them.
    """
    giving = teacher.lm_head.giving(lambda head, hidden: hidden.flatten(0, 1)[positions])
    with torch.no_grad(), without_adapters(teacher), giving:
        return teacher(input_ids)


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    loss: DistillationLoss,
    input_ids: Tensor,
    positions: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor,
    vocab_size: int,
) -> HeadLoss:
    """The loss of one micro-batch, computed inside the student's forward.

    Args:
        student: as Fabric set it up.
        teacher: from :func:`set_up_teacher`, or the student for its base without adapters; its head is read here, after
            its forward, or after ``sharding.unshard``.
        loss: what to compute.
        input_ids: ``[batch, time]``.
        positions: ``[n]``, flat positions in ``input_ids`` whose next token is a response token.
        labels: ``[n]``, those next tokens.
        teacher_hidden: ``[n, D]``, the teacher's final hidden states at the positions.
        vocab_size: ids that tokenizer and both heads have.
    """
    teacher_head = teacher.lm_head

    def give(head: Head, hidden: Tensor) -> HeadLoss:
        return loss(
            *head.factors(hidden.flatten(0, 1)[positions]),
            teacher_hidden,
            teacher_head.weight,
            labels,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            student_softcap=head.softcap,
            teacher_softcap=teacher_head.softcap,
            vocab_size=vocab_size,
            all_count=True,
        )

    with student.lm_head.giving(give):
        result = student(input_ids)
    reshard(teacher)
    return result
