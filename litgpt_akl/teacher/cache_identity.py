"""What a teacher cache is of, written into it, and what a run needs of it: other data is never taken for it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
import xxhash
from litgpt.data import DataModule
from litgpt.prompts import PromptStyle

from litgpt_akl.config.args import CacheArgs, TeacherArgs
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.preparation import probe
from litgpt_akl.data.steps import StepSampler
from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.reading import with_checksum, without_checksum
from litgpt_akl.loss.top_k import TopK, find_top_k, k_of
from litgpt_akl.messages import UserError, reason
from litgpt_akl.models.pair import Pair
from litgpt_akl.models.tokenizer import token_map
from litgpt_akl.models.weights import fingerprint, weights_files
from litgpt_akl.teacher.chunk_file import DTYPES

IDENTITY = "cache.json"
FORMAT = 1
NOT_THERE = object()


@dataclass(frozen=True)
class Identity:
    """All that the teacher's hidden states depend on, apart from each sample's own ids."""

    teacher: str
    """The name of its configuration."""
    teacher_weights: str | None
    """Their fingerprint; None if they are not there, and need not be."""
    teacher_precision: str
    """What it computes in."""
    teacher_quantize: str | None
    stored_as: str
    """The type of the hidden states on disk, by its name in safetensors; or that of distributions, such as topk:64."""
    width: int
    """Numbers in a hidden state."""
    tokenizer: str
    """A hash of its ids and tokens."""
    prompt_style: str
    """How records become prompts, chat template included."""
    mask_prompt: bool
    max_seq_length: int | None
    training_samples: int
    training_tokens: int
    validation_samples: int
    validation_tokens: int
    date: str | None = None
    """The day that the chat template writes, if it writes any; caches of before do not tell."""
    vocab_size: int | None = None
    """Over how many ids distributions are; None for hidden states, which do not depend on it, and before there were
    any others."""
    format: int = FORMAT

    @property
    def top_k(self) -> TopK | None:
        """How distributions are stored; None for hidden states."""
        return None if self.vocab_size is None else find_top_k(self.stored_as, self.vocab_size)

    @property
    def row(self) -> tuple[torch.dtype, int]:
        """What a token has on disk: the type and number of its numbers."""
        if self.top_k is not None:
            return torch.uint8, self.top_k.bytes_of_token
        return DTYPES[self.stored_as], self.width


def check_identity(directory: str, identity: Identity, create: bool) -> str | None:
    """See that a cache is of ``identity``; one that is not there yet is begun, if it may be.

    Returns the fingerprint of the teacher's weights that it was filled with. Raises UserError if it is of something
    else, and of what; or if it cannot be read or written, or is not there.
    """
    saved = read_identity(directory)
    if saved is None and create:
        content = json.dumps(with_checksum(asdict(identity)), indent=2) + "\n"
        with explain_failure(Path(directory)):
            Path(directory).mkdir(parents=True, exist_ok=True)
            # that of another job, which may be of something else, stays
            write_file(Path(directory) / IDENTITY, content.encode(), replace=False)
        # another job may have begun it at the same moment
        saved = read_identity(directory)
    if saved is None:
        raise UserError(
            f"--teacher.cache_dir {directory} has no {IDENTITY}: it is no cache, or it was not filled.\n"
            "Fill it with --teacher.cache_mode fill, or give another directory."
        )
    changes = [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in asdict(identity).items()
        if saved.get(name, {"date": value, "vocab_size": None}.get(name, NOT_THERE)) != value
        and not (name == "teacher_weights" and name in saved and value is None)
    ]
    if changes:
        raise UserError(
            f"--teacher.cache_dir {directory} was filled for something else: {'; '.join(changes)}.\n"
            "Give what it was filled with, or another directory."
        )
    return saved["teacher_weights"]


def read_identity(directory: str) -> dict[str, Any] | None:
    """What is written in a cache; None if there is none. Raises UserError if it cannot be read."""
    path = f"{directory.rstrip('/')}/{IDENTITY}"
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            return without_checksum(json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is garbled. Delete {directory}, and fill it again.") from error
    # every kind of remote storage has exceptions of its own
    except Exception as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def make_identity(
    pair: Pair,
    teacher: TeacherArgs | CacheArgs,
    dtype: torch.dtype,
    data: DataModule,
    max_seq_length: int | None,
    splits: tuple[TokenizedDataset, TokenizedDataset],
    recorded: str | None = None,
) -> Identity:
    """What the hidden states of a run's teacher depend on; ``recorded`` is a cache's fingerprint of its weights."""
    tokens = sorted(token_map(pair.teacher_tokenizer or pair.tokenizer).items())
    style = "the teacher's own" if pair.teacher_tokenizer else describe_style(getattr(data, "prompt_style", None))
    return Identity(
        teacher=pair.teacher_config.name,
        teacher_weights=fingerprint(pair.teacher_dir, like=recorded) if weights_files(pair.teacher_dir) else None,
        teacher_precision=str(dtype).removeprefix("torch."),
        teacher_quantize=getattr(teacher, "quantize", None),
        stored_as=stored_type(teacher.cache_dtype, dtype),
        width=pair.teacher_config.n_embd,
        tokenizer=xxhash.xxh3_64_hexdigest(repr(tokens).encode()),
        prompt_style=style,
        mask_prompt=getattr(data, "mask_prompt", False),
        max_seq_length=max_seq_length,
        training_samples=len(splits[0]),
        training_tokens=splits[0].teacher_tokens,
        validation_samples=len(splits[1]),
        validation_tokens=splits[1].teacher_tokens,
        date=getattr(data, "date", None),
        vocab_size=None if k_of(teacher.cache_dtype) is None else pair.vocab_size,
    )


def stored_type(cache_dtype: str | None, dtype: torch.dtype) -> str:
    """The type of hidden states on disk, by its name in safetensors: what was asked for, else the teacher's own; that
    of distributions by its own name."""
    if k_of(cache_dtype) is not None:
        return cache_dtype
    names = {"bf16": "BF16", "fp8": "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    return names[cache_dtype or dtype]


def describe_style(style: PromptStyle | None) -> str:
    """By its name, and by what it does."""
    if style is None:
        return "none"
    return f"{type(style).__name__} {xxhash.xxh3_64_hexdigest(repr(probe(style)).encode())}"


def needed_samples(sampler: StepSampler, steps: int) -> np.ndarray:
    """The numbers of the training samples that a run of so many steps comes to."""
    if steps >= sampler.steps_per_epoch:
        return np.arange(sampler.samples)
    return np.sort(np.concatenate([sampler.step(0, step) for step in range(steps)]))
