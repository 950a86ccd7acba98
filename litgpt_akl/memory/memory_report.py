"""The prediction of a run's memory for people: a table, and what to change if it does not fit."""

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from litgpt_akl.memory.estimate import peak, predict
from litgpt_akl.memory.memory_plan import MemoryPlan
from litgpt_akl.messages import UserError

GB = 1e9
"""What a gigabyte is here, in bytes."""
MOST_DEVICES = 64
"""Devices on a node, or nodes, that are tried."""


def report_memory(plan: MemoryPlan, limit: float | None, options: Collection[str]) -> None:
    """Print a run's table, and see that the run fits.

    Args:
        plan: of the run.
        limit: bytes of a device, if known.
        options: names of the options that the command has, those of groups without the groups' members.

    Raises:
        UserError: it does not; says what is needed, what there is, and which options would make it fit.
    """
    print(describe_memory(plan, limit), flush=True)
    if limit is not None:
        check_fit(plan, limit, options)


def describe_memory(plan: MemoryPlan, limit: float | None) -> str:
    """A table of a device's memory at its peak, in GB.

    Args:
        plan: of the run.
        limit: bytes of a device, if known.
    """
    moments = predict(plan)
    highest = peak(moments)
    where = f"each of {plan.processes} GPUs" if plan.device == "cuda" else f"each of {plan.processes} processes"
    if plan.processes == 1:
        where = "the GPU" if plan.device == "cuda" else "the process"
    rows = [(part, _in_gb(size, highest.total)) for part, size in highest.parts.items() if size > 0]
    rows.append(("together", _in_gb(highest.total)))
    width, digits = max(len(part) for part, _ in rows), max(len(size) for _, size in rows)
    rows = [f"  {part:<{width}}  {size:>{digits}}" for part, size in rows]
    rows[-1] += f" of {_in_gb(limit)}" if limit is not None else ""
    largest = sorted(highest.parts, key=highest.parts.get, reverse=True)[:2]
    others = ", ".join(
        f"{moment.name} {_in_gb(moment.total, highest.total)}" for moment in moments if moment is not highest
    )
    others = f" At other moments: {others}." if others else ""
    return "\n".join(
        [
            f"Predicted memory of {where} in GB, at its peak, the {highest.name}:",
            *rows,
            f"Most of it: {largest[0]} and {largest[1]}.{others}",
            f"For {_models(plan)}; {_shape(plan)}.",
        ]
    )


def check_fit(plan: MemoryPlan, limit: float, options: Collection[str]) -> None:
    """See that a run fits into ``limit`` bytes of each device; the arguments and the error are `report_memory`'s."""
    highest = peak(predict(plan))
    if highest.total <= limit:
        return
    device = "GPU" if plan.device == "cuda" else "process"
    raise UserError(
        f"This run needs {_in_gb(highest.total)} GB on each {device} ({highest.name}), and there are"
        f" {_in_gb(limit)} GB.\n{_advice(plan, limit, options)}"
    )


def ways_out(plan: MemoryPlan, limit: float, options: Collection[str]) -> list[tuple[str, float]]:
    """Up to three changes of which each alone would make a run fit, as options and the bytes that it needs then."""
    found = []
    for changes in _changes(plan, options):
        fitting = ((option, _need(changed)) for option, changed in changes)
        found += [next(((option, need) for option, need in fitting if need <= limit), None)]
    return [way for way in found if way is not None][:3]


def ways_out_together(plan: MemoryPlan, limit: float, options: Collection[str]) -> tuple[list[str], float] | None:
    """Changes that would make a run fit together, as few as are found one after the other, and what is needed then."""
    chosen: list[str] = []
    while True:
        steps = [[*changes] for changes in _changes(plan, options)]
        steps = [[(option, changed, _need(changed)) for option, changed in changes] for changes in steps if changes]
        steps = [changes for changes in steps if not any(_same(changes[-1][0], option) for option in chosen)]
        if not steps:
            return None
        # the last of a kind is the one that saves most
        best = min(steps, key=lambda changes: changes[-1][2])
        option, plan, need = next((change for change in best if change[2] <= limit), best[-1])
        chosen.append(option)
        if need <= limit:
            return chosen, need


def _need(plan: MemoryPlan) -> float:
    return peak(predict(plan)).total


def _same(option: str, other: str) -> bool:
    return option.split()[0] == other.split()[0]


def _advice(plan: MemoryPlan, limit: float, options: Collection[str]) -> str:
    alone = [f"{option} ({_in_gb(need)} GB)" for option, need in ways_out(plan, limit, options)]
    if alone:
        return f"It would fit with {' or '.join([', '.join(alone[:-1]), alone[-1]] if alone[:-1] else alone)}."
    together = ways_out_together(plan, limit, options)
    if together is None:
        return "No option of this command makes it fit: choose a smaller teacher or student."
    return f"It would fit with {' '.join(together[0])} together ({_in_gb(together[1])} GB)."


def _changes(plan: MemoryPlan, options: Collection[str]) -> list[Iterator[tuple[str, MemoryPlan]]]:
    """Kinds of changes that save memory, those first that cost least; each kind from little to much."""
    kinds = []
    if plan.micro_batch_tokens is None:
        kinds.append(_halved(plan, "train.micro_batch_size", "micro_batch_size", plan.samples, least=1))
    if "activation_checkpointing" in options and not plan.activation_checkpointing:
        kinds.append(iter([("--activation_checkpointing true", replace(plan, activation_checkpointing=True))]))
    if plan.hybrid_sharding:
        kinds.append(iter([("--hybrid_sharding false", replace(plan, hybrid_sharding=False))]))
    if plan.teacher_dtype == torch.float32:
        kinds.append(iter([("--teacher.precision bf16-true", replace(plan, teacher_dtype=torch.bfloat16))]))
    if plan.precision != "bf16-true":
        kinds.append(iter([("--precision bf16-true", replace(plan, precision="bf16-true"))]))
    if (
        plan.device == "cuda"
        and plan.processes > 1
        and plan.teacher_role == "live"
        and not (plan.cpu_offload or plan.shares_base)
    ):
        kinds.append(iter([("--teacher.cpu_offload true", replace(plan, cpu_offload=True))]))
    if plan.device == "cuda":
        # on a CPU more processes share the same memory
        kinds.append(_more_devices(plan))
    kinds.append(_halved(plan, "train.max_seq_length", "sequence_length", plan.sequence_length, least=128))
    return kinds


def _halved(plan: MemoryPlan, option: str, field: str, value: int, least: int) -> Iterator[tuple[str, MemoryPlan]]:
    while (value := value // 2) >= least:
        yield f"--{option} {value}", replace(plan, **{field: value})


def _more_devices(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Up to eight on a node, which are the most that many machines have, then more nodes."""
    devices, nodes = plan.devices, plan.num_nodes
    while devices * 2 <= 8:
        devices *= 2
        yield f"--devices {devices}", replace(plan, devices=devices)
    while not plan.hybrid_sharding and nodes * devices < MOST_DEVICES:
        nodes *= 2
        yield f"--devices {devices} --num_nodes {nodes}", replace(plan, devices=devices, num_nodes=nodes)


def _in_gb(size: float, beside: float | None = None) -> str:
    """Bytes as GB, with more digits where ``size``, or what it stands beside, is below one."""
    return f"{size / GB:.{1 if (beside or size) >= GB else 3}f}"


def _models(plan: MemoryPlan) -> str:
    types = {torch.bfloat16: "bf16", torch.float32: "float32"}
    student = f"{plan.student.name} in {plan.precision}, taught by "
    where = ", from CPU memory" if plan.cpu_offload else ""
    if plan.teacher_role == "remembered":
        where = ", remembered: its LM head only"
    teacher = f"{plan.teacher.name} in {types[plan.teacher_dtype]}{where}"
    return teacher if plan.teacher_role == "alone" else student + teacher


def _shape(plan: MemoryPlan) -> str:
    text = f"micro-batches of {plan.samples} x {plan.sequence_length:,} tokens"
    return text + (f", sharded over {plan.shards}" if plan.shards > 1 else "")
