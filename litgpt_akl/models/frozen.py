"""A model that is not trained: frozen, sharded or quantized, with its weights."""

from pathlib import Path
from typing import Literal

import lightning as L
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.models.gpt import build_model, compile_blocks, empty_weights, is_tied, set_up_teacher
from litgpt_akl.models.parallel import load_weights
from litgpt_akl.models.quantize import load_quantized
from litgpt_akl.models.weights import open_weights


def load_frozen(
    fabric: L.Fabric,
    directory: Path,
    config: Config,
    dtype: torch.dtype,
    *,
    quantize: Literal["int8", "nf4"] | None = None,
    compile: bool = False,
) -> GPT:
    """A checkpoint's model, whose weights only process 0 reads.

    Args:
        fabric: of the run.
        directory: of the checkpoint.
        config: of the model.
        dtype: what it is held in and computes in.
        quantize: whether the weights of its blocks are held in fewer bits.
        compile: whether torch.compile fuses what is in a block.

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
