"""Student and teacher: LitGPT's GPT with an LM head that can also hand over hidden states or give the loss."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from litgpt import lora
from litgpt.config import Config
from litgpt.lora import LoRALinear
from litgpt.model import GPT, do_softcapping
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litgpt_akl.loss.aligned_loss import LossOfBatch
from litgpt_akl.loss.blockwise import HeadLoss, LMHead
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.top_k import TopK, is_packed, pack_head
from litgpt_akl.loss.top_k_loss import top_k_loss
from litgpt_akl.messages import UserError
from litgpt_akl.models.lora import without_adapters
from litgpt_akl.models.parallel import load_weights, reshard
from litgpt_akl.models.weights import is_said_to_be_tied, open_weights

Precision = Literal["32-true", "bf16-true"]
"""What a model that is not trained can be held in."""


class Head(nn.Module):
    """Put before a linear layer among a class's bases: gives logits, softcap included, or as `output_of_head` says."""

    softcap: float | None = None
    _give: Callable[["Head", Tensor], Any] | None = None

    def forward(self, hidden: Tensor) -> Any:
        if self._give is not None:
            return self._give(self, hidden)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., vocab]`` of hidden states ``[..., n_embd]``."""
        logits = super().forward(hidden)
        return logits if self.softcap is None else do_softcapping(logits, self.softcap)

    def at(self, hidden: Tensor) -> LMHead:
        """What the loss asks of a teacher whose final hidden states are ``[n, n_embd]``."""
        return LMHead(hidden, self.weight, self.bias, self.softcap)

    @contextmanager
    def output_of_head(self, give: Callable[["Head", Tensor], Any]) -> Iterator[None]:
        """The model returns ``give(head, hidden)`` with the final hidden states ``[batch, time, n_embd]``."""
        self._give = give
        try:
            yield
        finally:
            self._give = None


class DistillationHead(Head, nn.Linear):
    """The head of a model without adapters on it."""

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, k]`` and ``[vocab, k]``, whose product is the logits of ``hidden`` ``[n, n_embd]`` but for the bias."""
        return hidden, self.weight


class LoRAHead(Head, LoRALinear):
    """A head with LitGPT's adapter; as of any other head, ``weight`` and ``bias`` are those of the base."""

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As of any other head, with k = n_embd + r: the adapter's product stands beside the base's."""
        if self.merged:
            return hidden, self.weight
        reduced = self.lora_dropout(hidden) @ self.lora_A.T * self.scaling
        return torch.cat((hidden, reduced), dim=1), torch.cat((self.weight, self.lora_B), dim=1)


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
    return _ask(teacher, input_ids, lambda head, hidden: hidden.flatten(0, 1)[positions])


def top_k_rows(teacher: nn.Module, input_ids: Tensor, positions: Tensor, labels: Tensor, top_k: TopK) -> Tensor:
    """The teacher's distributions there, packed, ``[n, bytes]`` in uint8; the ids ``labels`` ``[n]`` follow."""

    def give(head: Head, hidden: Tensor) -> Tensor:
        return pack_head(LMHead(hidden.flatten(0, 1)[positions], head.weight, head.bias, head.softcap), labels, top_k)

    return _ask(teacher, input_ids, give)


def _ask(teacher: nn.Module, input_ids: Tensor, give: Callable[[Head, Tensor], Tensor]) -> Tensor:
    """What a teacher's forward gives when its head is whole."""
    with torch.no_grad(), without_adapters(teacher), teacher.lm_head.output_of_head(give):
        return teacher(input_ids)


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    loss: DistillationLoss | LossOfBatch,
    input_ids: Tensor,
    positions: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    vocab_size: int,
) -> HeadLoss:
    """The loss of one micro-batch, computed inside the student's forward.

    Args:
        teacher: from :func:`set_up_teacher`, or the student for its base without adapters, or a mixture of several; its
            head is read here, after its forward, or after :func:`~litgpt_akl.models.parallel.unshard`, unless
            distributions are given.
        input_ids: ``[batch, time]``.
        positions: ``[n]``, flat positions in ``input_ids`` whose next token is a response token.
        labels: ``[n]``, those next tokens.
        teacher_hidden: ``[n, D]``, the teacher's final hidden states at the positions, or at those of its own tokens,
            of a mixture one for each; or ``[n, bytes]``, its distributions there from :func:`top_k_rows`.
        vocab_size: ids that tokenizer and both heads have.
    """
    return distillation_losses(
        student, teacher, loss, input_ids, positions, labels, teacher_hidden, vocab_size, alone=False
    )[0]


def distillation_losses(
    student: nn.Module,
    teacher: nn.Module,
    loss: DistillationLoss,
    input_ids: Tensor,
    positions: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    vocab_size: int,
    alone: bool = True,
) -> list[HeadLoss]:
    """That of :func:`distillation_loss`, and ``alone`` those to each of the teachers of a mixture by itself."""
    teacher_head = teacher.lm_head
    known = {"vocab_size": vocab_size, "sequences": positions // input_ids.size(1)}

    def give(head: Head, hidden: Tensor) -> list[HeadLoss]:
        of_student = LMHead(*head.factors(hidden.flatten(0, 1)[positions]), head.bias, head.softcap)
        if is_packed(teacher_hidden):
            return [top_k_loss(loss, of_student, teacher_hidden, labels, **known)]
        whole = teacher_head.at(teacher_hidden)
        parts = whole.heads if alone and len(whole.heads) > 1 else ()
        return [loss.of_heads(of_student, each, labels, **known, all_count=True) for each in (whole, *parts)]

    with student.lm_head.output_of_head(give):
        results = student(input_ids)
    reshard(teacher)
    return results


def check_quantization(kind: str, processes: int, needed: bool) -> None:
    """Refuse what cannot be had before anything is loaded; bitsandbytes must be there if it is ``needed``.

    Raises:
        UserError: there is more than one process, or no bitsandbytes.
    """
    if processes > 1:
        raise UserError(
            f"--teacher.quantize {kind} is for one device, and this run has {processes}: there a sharded teacher takes"
            " less. Leave it out."
        )
    if needed and find_spec("bitsandbytes") is None:
        raise UserError(
            f"--teacher.quantize {kind} needs bitsandbytes, which is not installed.\n"
            "Run pip install '.[quantize]' in litgpt-akl's folder, or leave it out."
        )


def load_quantized(
    teacher: GPT, weights: dict[str, Tensor], kind: Literal["int8", "nf4"], dtype: torch.dtype, device: torch.device
) -> GPT:
    """Give a teacher on the meta device its weights, those of the linear layers in its blocks quantized.

    One layer at a time is whole on the device. Embeddings, norms and LM head keep ``dtype``, and so do layers whose
    sizes are no multiples of 64, which bitsandbytes cannot pack on every device.
    """
    tied = teacher.transformer.wte.weight is teacher.lm_head.weight
    for name, module in list(teacher.named_modules()):
        prefix = f"{name}." if name else ""
        own = {key: weights[prefix + key].to(dtype) for key, _ in module.named_parameters(recurse=False)}
        if type(module) is nn.Linear and module.in_features % 64 == module.out_features % 64 == 0:
            # bitsandbytes quantizes what comes from the CPU: int8 weights that are on a GPU already stay as they are
            teacher.set_submodule(name, _quantize(module, own, kind, dtype).to(device))
        else:
            for key, value in own.items():
                module.register_parameter(key, nn.Parameter(value.to(device)))
    return finish(teacher, tied, device)


def _quantize(linear: nn.Linear, own: dict[str, Tensor], kind: str, dtype: torch.dtype) -> nn.Linear:
    # on a CPU it reports that a faster kernel is not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import nn as quantized

    shape = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": "bias" in own}
    if kind == "int8":
        layer = quantized.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = quantized.Int8Params(own["weight"], requires_grad=False, has_fp16_weights=False)
    else:
        layer = quantized.Linear4bit(**shape, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = quantized.Params4bit(own["weight"], requires_grad=False, quant_type="nf4")
    if "bias" in own:
        layer.bias = nn.Parameter(own["bias"])
    return layer


def finish(model: GPT, tied: bool, device: torch.device) -> GPT:
    """Freeze a model that was given parameters on the meta device."""
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    model.cos, model.sin = model.rope_cache(device=device)
    return model.requires_grad_(False).eval()


def frozen_precision(chosen: Precision | None) -> tuple[Precision, torch.dtype]:
    """What models that are not trained are held in and computed with, as Fabric and as torch name it.

    Args:
        chosen: what a user has given; by default bf16-true on a GPU, 32-true on a CPU.
    """
    precision = chosen or ("bf16-true" if torch.cuda.is_available() else "32-true")
    return precision, torch.bfloat16 if precision == "bf16-true" else torch.float32


def load_frozen(
    fabric: L.Fabric,
    directory: Path,
    config: Config,
    dtype: torch.dtype,
    *,
    quantize: Literal["int8", "nf4"] | None = None,
    compile: bool = False,
) -> GPT:
    """A checkpoint's model, held in ``dtype``, in which it computes; only process 0 reads the weights.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    weights, tied = None, None
    if fabric.is_global_zero:
        weights = open_weights(directory, config)
        tied = is_tied(directory, weights, None)
    tied = fabric.broadcast(tied)
    # a quantized one is never whole on the device
    with torch.device("meta") if quantize else empty_weights(fabric, dtype):
        model = build_model(config, tied)
    if compile:
        compile_blocks(model)
    if quantize:
        return load_quantized(model, weights, quantize, dtype, fabric.device)
    model = set_up_teacher(fabric, model)
    load_weights(model, weights)
    return model
