"""A teacher whose blocks are held in 8 or 4 bits by bitsandbytes."""

import logging
from importlib.util import find_spec
from typing import Literal

import torch
from litgpt.model import GPT
from torch import Tensor, nn

from litgpt_akl.messages import UserError


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
