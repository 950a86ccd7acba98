"""A teacher whose blocks are held in 8 or 4 bits by bitsandbytes, and what that costs in accuracy."""

import logging
from importlib.util import find_spec
from typing import Literal

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor, nn

from litgpt_akl.data.windows import MicroBatch
from litgpt_akl.errors import UserError
from litgpt_akl.head_loss import DistillationLoss
from litgpt_akl.models import build_model, hidden_states


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
        raise UserError(f"--teacher.quantize {kind} needs bitsandbytes: pip install 'litgpt-akl[quantize]'")


def load_quantized(
    teacher: GPT, weights: dict[str, Tensor], kind: Literal["int8", "nf4"], dtype: torch.dtype, device: torch.device
) -> GPT:
    """Give a teacher on the meta device its weights, those of the linear layers in its blocks quantized.

    One layer at a time is whole on the device. Embeddings, norms and LM head keep ``dtype``, and so do layers whose
    sizes are no multiples of 64, which bitsandbytes cannot pack on every device.
    """
    tied = teacher.transformer.wte.weight is teacher.lm_head.weight
    for name, module in list(teacher.named_modules()):
        own = {
            key: weights[f"{name}.{key}" if name else key].to(device, dtype)
            for key, _ in module.named_parameters(recurse=False)
        }
        if type(module) is nn.Linear and module.in_features % 64 == module.out_features % 64 == 0:
            teacher.set_submodule(name, _quantize(module, own, kind, dtype).to(device))
        else:
            for key, value in own.items():
                module.register_parameter(key, nn.Parameter(value))
    return _finish(teacher, tied, device)


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


def _finish(model: GPT, tied: bool, device: torch.device) -> GPT:
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    model.cos, model.sin = model.rope_cache(device=device)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def loss_of_quantization(
    teacher: GPT, config: Config, weights: dict[str, Tensor], batch: MicroBatch, vocab_size: int
) -> tuple[dict[str, float], int]:
    """Compare a quantized teacher with its full weights, which are read from their file on the CPU.

    Returns:
        Sums of the statistics over the response tokens of ``batch``, and how many those are; the full weights are the
        teacher there, the quantized ones the student.
    """
    with torch.device("meta"):
        full = build_model(config, tied=False)
    full.load_state_dict(weights, assign=True)
    full = _finish(full, tied=False, device=torch.device("cpu"))
    expected = hidden_states(full, batch.input_ids, batch.positions)
    device, head = teacher.lm_head.weight.device, teacher.lm_head
    found = hidden_states(teacher, batch.input_ids.to(device), batch.positions.to(device))
    result = DistillationLoss(divergence="fkl", kd_ratio=1.0, compile=False)(
        found.cpu().float(),
        head.weight.cpu().float(),
        expected.float(),
        full.lm_head.weight.float(),
        batch.labels,
        student_bias=None if head.bias is None else head.bias.cpu().float(),
        teacher_bias=None if head.bias is None else full.lm_head.bias.float(),
        student_softcap=head.softcap,
        teacher_softcap=head.softcap,
        vocab_size=vocab_size,
    )
    return {name: value.item() for name, value in result.stats.items()}, result.tokens
