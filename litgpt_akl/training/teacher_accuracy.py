"""What a teacher loses when it is held, or cached, in fewer bits; and whether it knows anything of the data."""

import json
import math
import shlex
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from litgpt.config import Config
from litgpt.model import GPT, do_softcapping
from torch import Tensor, nn

from litgpt_akl.data.dataset import TokenizedDataset, digest
from litgpt_akl.data.steps import MicroBatch, in_order
from litgpt_akl.files.directories import write_file
from litgpt_akl.loss.comparison import compare
from litgpt_akl.messages import entry, reason, say
from litgpt_akl.models.gpt import Head, build_model, finish, hidden_states
from litgpt_akl.models.parallel import broadcast_object, rank, reshard
from litgpt_akl.models.weights import fingerprint, open_weights
from litgpt_akl.teacher.cache import Caches
from litgpt_akl.teacher.chunk_file import decode, encode
from litgpt_akl.teacher.teacher import HeadOnly
from litgpt_akl.training.run import Run

FILE = "teacher_accuracy.json"
"""In the cache that a run writes to, else in its ``out_dir``: what was found, since the full teacher takes long."""
SAMPLES = 4
"""That are compared."""
TOKENS = 256
"""Of their response tokens, at most, spread evenly; each takes a product with both LM heads."""

_HEAD_NUMBERS = 2**23
"""Of an LM head that are in memory in float32 at a time."""
_LOGITS = 2**24
"""Of one teacher that are in memory at a time."""


class Loss(NamedTuple):
    """How far one teacher's distributions are from another's."""

    forward_kl: float
    """In nats per token."""
    agreement: float
    """Share of the tokens at which both have the same top-1 id."""
    tokens: int

    def __str__(self) -> str:
        same = f"the same top-1 id at {self.agreement:.1%} of {self.tokens} response tokens"
        return f"{self.forward_kl:.4f} nats per token, {same}"


def report_accuracy(fabric: L.Fabric, run: Run, teacher: nn.Module, dataset: TokenizedDataset, caches: Caches) -> None:
    """Print what quantization, and what narrow hidden states on disk, cost; nothing if there is neither.

    What another run has found is read, and not computed again. All processes must ask together; process 0 compares.
    """
    said = {}
    if run.teacher.quantize is not None:
        said[run.teacher.quantize] = "The teacher in {}: forward KL of its full weights to it {}"
    stores_hidden = caches.writable and caches.training.top_k is None
    if stores_hidden and caches.training.dtype.itemsize < run.memory.teacher_dtype.itemsize:
        said[run.teacher.cache_dtype] = "The teacher cache in {}: forward KL of the teacher to it {}"
    path = (Path(caches.directory) if caches.writable else run.out_dir) / FILE
    samples = range(min(SAMPLES, len(dataset)))
    for kind, words in said.items():
        of = _depends_on(run, caches, dataset.read(samples), kind, fabric.device.type)
        lost = broadcast_object(_read(path, kind, of) if fabric.is_global_zero else None)
        if lost is None and not isinstance(teacher, HeadOnly):
            batches = list(in_order(dataset, samples, *run.micro_batch))
            lost = _compute(run, caches, teacher, batches, kind)
            if fabric.is_global_zero:
                _keep(path, kind, of, lost)
        if lost is not None and fabric.is_global_zero:
            entry("Note", words.format(kind, lost))


def doubt_teacher(run: Run, state: dict, cross_entropy: float) -> None:
    """Warn once if a teacher's cross-entropy of recorded responses, nats a token, is above that of a uniform guess."""
    uniform = math.log(run.pair.vocab_size)
    if state["teacher_is_doubted"] or not cross_entropy > uniform:
        return
    state["teacher_is_doubted"] = True
    whose = "the teacher's" if not run.pair.others else "the mixed teachers'"
    entry(
        "Warning",
        f"{whose} cross-entropy of these responses is {cross_entropy:.2f} nats a token, that of a uniform guess"
        f" {uniform:.2f}. See whether it is asked in its own form and answers well: litgpt chat"
        f" {shlex.quote(str(run.pair.teacher_dir))}. It can write the responses itself: litgpt generate_responses.",
    )


def _depends_on(
    run: Run, caches: Caches, samples: list[dict[str, Tensor]], kind: str, device_type: str
) -> dict[str, Any]:
    """All that decides how much is lost, as plain data."""
    return {
        "kind": kind,
        "quantize": run.teacher.quantize,
        "teacher_weights": caches.teacher_weights or fingerprint(run.pair.teacher_dir),
        "teacher_dtype": str(run.memory.teacher_dtype),
        "samples": [digest(sample) for sample in samples],
        "vocab_size": run.pair.vocab_size,
        "device": device_type,
        "torch": str(torch.__version__),
        "bitsandbytes": None if run.teacher.quantize is None else version("bitsandbytes"),
    }


def _entries(path: Path) -> dict[str, Any]:
    """What the file holds of each kind; nothing if it is not there, or not whole."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        return {}


def _read(path: Path, kind: str, of: dict[str, Any]) -> Loss | None:
    """What was found of that kind, if it depended on the same."""
    with suppress(KeyError, TypeError):
        entry = _entries(path)[kind]
        return Loss(**entry["lost"]) if entry["of"] == of else None
    return None


def _keep(path: Path, kind: str, of: dict[str, Any], lost: Loss) -> None:
    content = _entries(path) | {kind: {"of": of, "lost": lost._asdict()}}
    try:
        write_file(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        say(f"{path} cannot be written ({reason(error)}): how near the teacher is will be computed again.")


def _compute(run: Run, caches: Caches, teacher: nn.Module, batches: list[MicroBatch], kind: str) -> Loss | None:
    if kind != run.teacher.quantize:
        return loss_of_storage(teacher, caches.training.dtype, batches, run.pair.vocab_size)
    weights = open_weights(run.pair.teacher_dir, run.pair.teacher_config)
    return loss_of_quantization(teacher, run.pair.teacher_config, weights, batches, run.pair.vocab_size)


@torch.no_grad()
def loss_of_storage(teacher: nn.Module, dtype: torch.dtype, batches: list[MicroBatch], vocab_size: int) -> Loss | None:
    """What of a teacher's hidden states, from :func:`~litgpt_akl.models.gpt.set_up_teacher`, is lost on disk.

    All processes must ask together, since its forward needs all; None in other processes than 0.
    """
    hidden, found = _read_samples(teacher, batches), None
    if rank() == 0:
        head = teacher.lm_head
        found = compare_teachers(hidden, head, decode(encode(hidden.cpu(), dtype)), head, vocab_size)
    reshard(teacher)
    return found


@torch.no_grad()
def loss_of_quantization(
    teacher: GPT, config: Config, weights: dict[str, Tensor], batches: list[MicroBatch], vocab_size: int
) -> Loss:
    """What of a teacher is lost in its quantized weights; the full ones are read from their file on the CPU."""
    with torch.device("meta"):
        full = build_model(config, tied=False)
    full.load_state_dict(weights, assign=True)
    full = finish(full, tied=False, device=torch.device("cpu"))
    expected, found = (_read_samples(model, batches) for model in (full, teacher))
    return compare_teachers(expected, full.lm_head, found, teacher.lm_head, vocab_size)


def _read_samples(teacher: nn.Module, batches: list[MicroBatch]) -> Tensor:
    """A teacher's final hidden states ``[n, D]`` at some response tokens of micro-batches."""
    # that which it computes on; its weights may lie elsewhere
    device = teacher.cos.device
    step = math.ceil(sum(len(batch.positions) for batch in batches) / TOKENS)
    places = [(batch.input_ids.to(device), batch.positions[::step].to(device)) for batch in batches]
    return torch.cat([hidden_states(teacher, *place) for place in places])


@torch.no_grad()
def compare_teachers(expected: Tensor, head: Head, found: Tensor, found_head: Head, vocab_size: int) -> Loss:
    """How far one teacher's distributions are from another's at some tokens, both heads read a block at a time.

    ``expected`` and ``found`` are final hidden states ``[n, D]`` of the teacher as it should be and as it is.
    """
    kl, agreement, rows = 0.0, 0, max(1, _LOGITS // vocab_size)
    for one, other in zip(expected.split(rows), found.split(rows), strict=True):
        logits, found_logits = _logits(head, one, vocab_size), _logits(found_head, other, vocab_size)
        kl += compare(logits, found_logits).forward_kl.sum().item()
        agreement += int((logits.argmax(dim=-1) == found_logits.argmax(dim=-1)).sum())
    return Loss(kl / len(expected), agreement / len(expected), len(expected))


def _logits(head: Head, hidden: Tensor, vocab_size: int) -> Tensor:
    """``[n, vocab_size]`` in float32 on the CPU."""
    weight = head.weight[:vocab_size]
    hidden = hidden.to(weight.device).float()
    logits, rows = hidden.new_empty(len(hidden), vocab_size), max(1, _HEAD_NUMBERS // weight.size(1))
    # one block for all: what glibc is given back in so large pieces it does not always use again
    block = hidden.new_empty(min(rows, vocab_size), weight.size(1))
    for start in range(0, vocab_size, rows):
        part = weight[start : start + rows]
        logits[:, start : start + len(part)] = hidden @ block[: len(part)].copy_(part).T
    if head.bias is not None:
        logits += head.bias[:vocab_size]
    return (logits if head.softcap is None else do_softcapping(logits, head.softcap)).cpu()
