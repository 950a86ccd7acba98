"""From a run to its cache: what it must be of, and what the run needs of it."""

import numpy as np
import torch
import xxhash
from litgpt.data import DataModule
from litgpt.prompts import PromptStyle

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.data.dataset import Store
from litgpt_akl.data.plan import Plan
from litgpt_akl.data.preparation import probe
from litgpt_akl.models.fingerprints import fingerprint
from litgpt_akl.models.pair import Pair, token_map
from litgpt_akl.models.weights import weights_files
from litgpt_akl.teacher.identity import Identity


def make_identity(
    pair: Pair,
    teacher: TeacherArgs,
    dtype: torch.dtype,
    data: DataModule,
    max_seq_length: int | None,
    stores: tuple[Store, Store],
    recorded: str | None = None,
) -> Identity:
    """What the hidden states of a run's teacher depend on; ``recorded`` is a cache's fingerprint of its weights."""
    tokens = sorted(token_map(pair.tokenizer).items())
    return Identity(
        teacher=pair.teacher_config.name,
        teacher_weights=fingerprint(pair.teacher_dir, like=recorded) if weights_files(pair.teacher_dir) else None,
        teacher_precision=str(dtype).removeprefix("torch."),
        teacher_quantize=teacher.quantize,
        stored_as=stored_type(teacher.cache_dtype, dtype),
        width=pair.teacher_config.n_embd,
        tokenizer=xxhash.xxh3_64_hexdigest(repr(tokens).encode()),
        prompt_style=describe_style(getattr(data, "prompt_style", None)),
        mask_prompt=getattr(data, "mask_prompt", False),
        max_seq_length=max_seq_length,
        training_samples=len(stores[0]),
        training_tokens=stores[0].tokens,
        validation_samples=len(stores[1]),
        validation_tokens=stores[1].tokens,
        date=getattr(data, "date", None),
    )


def stored_type(cache_dtype: str | None, dtype: torch.dtype) -> str:
    """The type of hidden states on disk, by its name in safetensors: what was asked for, else the teacher's own."""
    names = {"bf16": "BF16", "fp8": "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    return names[cache_dtype or dtype]


def describe_style(style: PromptStyle | None) -> str:
    """By its name, and by what it does."""
    if style is None:
        return "none"
    return f"{type(style).__name__} {xxhash.xxh3_64_hexdigest(repr(probe(style)).encode())}"


def needed_samples(plan: Plan, steps: int) -> np.ndarray:
    """The numbers of the training samples that a run of so many steps comes to."""
    if steps >= plan.steps_per_epoch:
        return np.arange(plan.samples)
    return np.sort(np.concatenate([plan.step(0, step) for step in range(steps)]))
