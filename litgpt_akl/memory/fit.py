"""Whether a run fits into its devices: said in a line or a table, and what to change if it does not."""

from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from textwrap import wrap

import torch

from litgpt_akl.config.args import OPTIONS
from litgpt_akl.data.workers import available_memory
from litgpt_akl.memory.estimate import GB, MemoryEstimate
from litgpt_akl.messages import UserError, entry

LITTLE = 0.7
"""Of a device's memory, of which only a line is said."""
COLUMNS = 80
"""Of a terminal."""
MOST_DEVICES = 64
"""That are tried; a node has up to eight, which are the most that many machines have."""


def device_bytes(device_memory: float | None, cuda: bool, processes: int) -> float | None:
    """Bytes that a device has for this run: as told in GB, else a GPU's own, or None if that is not here."""
    if device_memory is not None:
        return device_memory * GB
    if not cuda:
        # the processes of a node share what is free, of a container's limit if there is one
        return available_memory() / processes
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def report_memory(estimate: MemoryEstimate, device_memory: float | None, in_full: bool = False) -> None:
    """Print what a run takes of each device: a line if that is little, else a table, which ``in_full`` asks for.

    Raises UserError if it takes more than ``device_memory``, in GB, or what a device has.
    """
    limit = device_bytes(device_memory, estimate.device == "cuda", estimate.devices)
    is_little = limit is not None and estimate.peak.total < LITTLE * limit
    if is_little and not in_full:
        entry("Memory", summarize_memory(estimate, limit))
    else:
        print(describe_memory(estimate, limit), flush=True)
    if limit is not None:
        check_fit(estimate, limit, OPTIONS)


def summarize_memory(estimate: MemoryEstimate, limit: float) -> str:
    """One line on a device's memory at its peak; ``limit`` are the bytes of a device."""
    samples, length = estimate.shape
    needed = f"{_in_gb(estimate.peak.total)} of {_in_gb(limit)} GB a device"
    return f"{needed} at the longest micro-batch ({samples} x {length:,} tokens)"


def describe_memory(estimate: MemoryEstimate, limit: float | None) -> str:
    """A table of a device's memory at its peak, in GB; ``limit`` are the bytes of a device, if known."""
    peak, name, plural = estimate.peak, *(("GPU", "GPUs") if estimate.device == "cuda" else ("process", "processes"))
    device = f"the {name}" if estimate.processes == 1 else f"each of {estimate.processes} {plural}"
    sizes = {part: size for part, size in peak.parts.items() if size > 0} | {"together": peak.total}
    cells = {part: _in_gb(size, peak.total) for part, size in sizes.items()}
    width, digits = max(map(len, cells)), max(map(len, cells.values()))
    rows = "\n".join(f"  {part:<{width}}  {cell:>{digits}}" for part, cell in cells.items())
    most = sorted(peak.parts, key=peak.parts.get, reverse=True)[:2]
    others = [f"{moment.name} {_in_gb(moment.total, peak.total)}" for moment in estimate.moments if moment is not peak]
    names = [of.name for of in (estimate.student, estimate.teacher)]
    if names[0] == names[1]:
        # a student made of a teacher's layers bears its name
        names = [f"{of.name} of {of.n_layer} layers" for of in (estimate.student, estimate.teacher)]
    names[1:] = [" and ".join([names[1], *(of.config.name for of in estimate.others)])]
    teacher = f"{names[1]} in {'bf16' if estimate.teacher_dtype == torch.bfloat16 else 'float32'}"
    if all(of.role == "cached" for of in estimate.teachers):
        teacher += ", cached: its LM head only" if estimate.top_k is None else ", cached: nothing of it is loaded"
    elif estimate.cpu_offload:
        teacher += ", from CPU memory"
    student = "" if estimate.teacher_role == "fill" else f"{names[0]} in {estimate.precision}, taught by "
    together = "" if limit is None else f" of {_in_gb(limit)}"
    others = f" At other moments: {', '.join(others)}." if others else ""
    sharded = f", sharded over {estimate.shards}" if estimate.shards > 1 else ""
    samples, length = estimate.shape
    beyond = "" if estimate.device == "cuda" else ", beyond what Python and its packages take"
    title = f"Predicted memory of {device} in GB{beyond}, at its peak, the {peak.name}:"
    end = f"Most of it: {' and '.join(most)}.{others}"
    shape = f"For {student}{teacher}; the longest micro-batch is of {samples} x {length:,} tokens{sharded}."
    return "\n".join([wrapped(title), f"{rows}{together}", wrapped(end), wrapped(shape)])


def wrapped(text: str) -> str:
    """The same lines, none longer than a terminal's."""
    return "\n".join(part for line in text.splitlines() for part in wrap(line, COLUMNS, break_on_hyphens=False))


def _in_gb(size: float, beside: float | None = None) -> str:
    """Bytes as GB, with more digits where ``size``, or what it stands beside, is below one."""
    return f"{size / GB:.{1 if (beside or size) >= GB else 3}f}"


def check_fit(estimate: MemoryEstimate, limit: float, options: Collection[str]) -> None:
    """See that a run fits into ``limit`` bytes of each device.

    Raises:
        UserError: it does not; says what is needed, what there is, and which of ``options`` would make it fit.
    """
    peak, device = estimate.peak, "GPU" if estimate.device == "cuda" else "process"
    if peak.total <= limit:
        return
    advice = "No option of this command makes it fit: choose a smaller teacher or student."
    if single := [f"{option} ({_in_gb(need)} GB)" for option, need in ways_out(estimate, limit, options)]:
        advice = f"It would fit with {' or '.join(filter(None, [', '.join(single[:-1]), single[-1]]))}."
    elif together := ways_out_together(estimate, limit, options):
        advice = f"It would fit with {' '.join(together[0])} together ({_in_gb(together[1])} GB)."
    needed = f"This run needs {_in_gb(peak.total)} GB on each {device} ({peak.name})"
    raise UserError(f"{needed}, and there are {_in_gb(limit)} GB.\n{advice}")


def ways_out(estimate: MemoryEstimate, limit: float, options: Collection[str]) -> list[tuple[str, float]]:
    """Up to three changes of which each alone would make a run fit, as options and the bytes that it needs then."""
    found = filter(None, (_first_fitting(kind, limit) for kind in _changes(estimate, options)))
    return [(option, changed.peak.total) for option, changed in islice(found, 3)]


def ways_out_together(
    estimate: MemoryEstimate, limit: float, options: Collection[str]
) -> tuple[list[str], float] | None:
    """Changes that would make a run fit together, as few as are found one after the other, and what is needed then."""
    chosen: dict[str, str] = {}
    while estimate.peak.total > limit:
        kinds = [kind for kind in _changes(estimate, options) if kind and kind[-1][0].split()[0] not in chosen]
        if not kinds:
            return None
        # the last of a kind is the one that saves most
        best = min(kinds, key=lambda kind: kind[-1][1].peak.total)
        option, estimate = _first_fitting(best, limit) or best[-1]
        chosen[option.split()[0]] = option
    return [*chosen.values()], estimate.peak.total


def _first_fitting(kind: list[tuple[str, MemoryEstimate]], limit: float) -> tuple[str, MemoryEstimate] | None:
    return next((change for change in kind if change[1].peak.total <= limit), None)


def _changes(estimate: MemoryEstimate, options: Collection[str]) -> list[list[tuple[str, MemoryEstimate]]]:
    """Kinds of changes that save memory, those first that cost least; each kind from little to much."""

    def change(possible: bool, option: str, **fields: list) -> list[tuple[str, MemoryEstimate]]:
        found = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True) if possible]
        return [(option.format(*values.values()), replace(estimate, **values)) for values in found]

    cuda, on_one = estimate.device == "cuda", estimate.processes == 1
    holds_teacher = estimate.teacher_role == "live" and not (estimate.cpu_offload or estimate.shares_base)
    can_checkpoint = "activation_checkpointing" in options and not estimate.activation_checkpointing
    is_wide, teacher_is_wide = estimate.precision != "bf16-true", estimate.teacher_dtype == torch.float32
    # on a CPU more processes share the same memory
    devices = [n for k in range(1, 4) if (n := estimate.devices << k) <= 8]
    most = max(devices, default=estimate.devices)
    nodes = [n for k in range(1, 7) if (n := estimate.num_nodes << k) * most < 2 * MOST_DEVICES]
    by_number, more_nodes = estimate.micro_batch_tokens is None, cuda and not estimate.hybrid_sharding
    shorter = change(True, "--train.max_seq_length {}", sequence_length=_halves(estimate.sequence_length, 128))
    kinds = [
        change(by_number, "--train.micro_batch_size {}", micro_batch_size=_halves(estimate.samples)),
        change(can_checkpoint, "--activation_checkpointing true", activation_checkpointing=[True]),
        change(estimate.hybrid_sharding, "--hybrid_sharding false", hybrid_sharding=[False]),
        change(teacher_is_wide, "--teacher.precision bf16-true", teacher_dtype=[torch.bfloat16]),
        change(is_wide, "--precision bf16-true", precision=["bf16-true"]),
        change(cuda and holds_teacher and not on_one, "--teacher.cpu_offload true", cpu_offload=[True]),
        change(cuda, "--devices {}", devices=devices)
        + change(more_nodes, "--devices {} --num_nodes {}", devices=[most] * len(nodes), num_nodes=nodes),
    ]
    # samples are cut or lost, unless the length is only assumed
    return [shorter, *kinds] if estimate.is_assumed else [*kinds, shorter]


def _halves(number: int, lowest: int = 1) -> list[int]:
    return [half for k in range(1, number.bit_length()) if (half := number >> k) >= lowest]
