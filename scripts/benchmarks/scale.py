"""What a run on many GPUs sends over its network, when that is hidden, and what fits: by count, without a GPU.

    python scripts/benchmarks/scale.py

FSDP2 spreads both models over N processes, and each of them receives what it lacks, (N - 1) / N of a model:

- the teacher's parameters once a micro-batch, or of a cached one its LM head alone;
- the student's blocks twice, for the forward and for the backward, and the rest of it (embeddings, last norm, LM head)
  once, since that stays whole from the forward to the end of the backward;
- sums of the student's gradients, in float32 whatever the parameters are, of which it also sends (N - 1) / N.

With hybrid sharding N are the GPUs of a node, and a ring over R nodes sends 2 (R - 1) / R of a process's share of the
gradients besides. These are the bytes that a process sends, which are those that it receives. A test counts them in
real processes (tests/system/test_scale.py). Nothing here was run on several GPUs.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

import torch
from gpu_benchmark.flops import PEAKS, step_operations
from gpu_benchmark.runs import make_estimate
from litgpt.config import Config

from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import FLOAT32, GB, LOSS, MemoryEstimate

PEAK, UTILISATION = PEAKS["H100"], 0.4
"""Operations a second of a GPU, and the share of them that a step is taken to make when nothing waits."""
WITHIN, BETWEEN = 450e9, 50e9
"""Bytes a second that a GPU sends: NVLink 4 within a node (half of the 900 GB/s of both directions), and 400 Gbit/s
InfiniBand from node to node."""
NODE = 8
"""GPUs of a node."""
PAIRS = {
    "Qwen3-30B-A3B into 4B": ("Qwen3-4B", "Qwen3-30B-A3B"),
    "Llama 70B into 8B": ("Llama-3.1-8B", "Llama-3.1-70B"),
    "Llama 405B into 8B": ("Llama-3.1-8B", "Llama-3.1-405B"),
}
LENGTHS = (2048, 8192, 32768)


class Traffic(NamedTuple):
    """Bytes that a process sends for a micro-batch; it receives as many."""

    teacher: float
    """Its parameters."""
    student: float
    """Its parameters, for the forward and for the backward."""
    gradients: float
    """Of the student, summed within the processes that share a model."""
    replicas: float
    """The same sums, over the nodes of hybrid sharding."""


def traffic(estimate: MemoryEstimate) -> Traffic:
    """What a micro-batch sends in each process; all parameters of the student are trained."""
    student, teacher = estimate.sizes
    shards, replicas = estimate.shards, estimate.processes // estimate.shards
    others = (shards - 1) / shards
    width = 2 if estimate.precision == "bf16-true" else FLOAT32
    read = teacher.head if estimate.teacher_role == "cached" else teacher.whole
    return Traffic(
        teacher=others * read * estimate.teacher_dtype.itemsize,
        student=others * (student.root + 2 * (student.whole - student.root)) * width,
        gradients=others * student.trained * FLOAT32,
        replicas=2 * (replicas - 1) / replicas * student.trained / shards * FLOAT32,
    )


def seconds(estimate: MemoryEstimate) -> tuple[float, float]:
    """Of a micro-batch in each process: its products, and what it sends if nothing else used the network."""
    sent, samples = traffic(estimate), estimate.samples * estimate.processes
    products = step_operations(replace(estimate, global_batch_size=samples)) / estimate.processes / PEAK / UTILISATION
    sharded = sent.teacher + sent.student + sent.gradients
    return products, sharded / (WITHIN if estimate.shards <= NODE else BETWEEN) + sent.replicas / BETWEEN


def make_run(student: str, teacher: str, gpus: int, **changes) -> MemoryEstimate:
    """A run of so many GPUs with 8,192 tokens in each one's micro-batch, all of them of responses."""
    defaults = {"precision": "bf16-true", "teacher_dtype": torch.bfloat16, "sequence_length": 2048}
    options = {**defaults, "micro_batch_size": 4, "activation_checkpointing": True, **changes}
    return make_estimate(
        Config.from_name(student),
        Config.from_name(teacher),
        device="cuda",
        devices=min(gpus, NODE),
        num_nodes=max(1, gpus // NODE),
        global_batch_size=4 * gpus * options["micro_batch_size"],
        loss=DistillationLoss(),
        student_tied="Qwen3-4B" in student,
        **options,
    )


def network_table(student: str, teacher: str) -> str:
    """By GPUs and kinds of teacher: GB that each sends for a micro-batch, and seconds to send and to compute."""
    lines = ["| GPUs | teacher | GB a micro-batch | kB a token | sending, s | products, s | hidden |", "|---" * 7 + "|"]
    for gpus in (1, 8, 64, 512):
        kinds = {"live": {}, "cached": {"teacher_role": "cached"}}
        if gpus > NODE:
            kinds["live, hybrid"] = {"hybrid_sharding": True}
        for kind, changes in kinds.items():
            run = make_run(student, teacher, gpus, **changes)
            sent, (products, sending) = sum(traffic(run)), seconds(run)
            cells = [f"{gpus}", kind, f"{sent / GB:.1f}", f"{sent / 8192 / 1e3:.0f}", f"{sending:.2f}"]
            lines.append(f"| {' | '.join([*cells, f'{products:.2f}', 'yes' if sending <= products else 'no'])} |")
    return "\n".join(lines)


def tokens_to_hide(student: str, teacher: str, **changes) -> int:
    """Tokens of a GPU's micro-batch from which on 64 GPUs compute for longer than they send."""
    products, sending = seconds(make_run(student, teacher, 64, **changes))
    # attention's squares aside, the products grow with the tokens, and what is sent does not
    return round(8192 * sending / products)


def reading_table() -> str:
    """What a cached teacher's hidden states take of a disk, and what they save."""
    lines = ["| pair | bytes a token | MB/s a GPU | products saved | tokens to hide: live | cached |", "|---" * 6 + "|"]
    for name, pair in PAIRS.items():
        live, cached = (make_run(*pair, 64, teacher_role=role) for role in ("live", "cached"))
        size = 2 * live.teacher.n_embd
        rate = 8192 / seconds(cached)[0]
        saved = 1 - seconds(cached)[0] / seconds(live)[0]
        hide = (f"{tokens_to_hide(*pair, teacher_role=role):,}" for role in ("live", "cached"))
        lines.append(f"| {' | '.join([name, f'{size:,}', f'{size * rate / 1e6:.0f}', f'{saved:.0%}', *hide])} |")
    return "\n".join(lines)


def memory_table() -> str:
    """The predicted peak of each GPU of 80 GB, by their number."""
    numbers = (8, 16, 32, 64)
    lines = [f"| pair | teacher | {' | '.join(f'{n} GPUs' for n in numbers)} |", "|---" * (2 + len(numbers)) + "|"]
    for name, pair in PAIRS.items():
        for role in ("live", "cached"):
            peaks = [make_run(*pair, gpus, teacher_role=role).peak.total / GB for gpus in numbers]
            lines.append(f"| {name} | {role} | {' | '.join(f'{peak:.1f}' for peak in peaks)} |")
    return "\n".join(lines)


def length_table() -> str:
    """One sample of each length in a micro-batch of 64 GPUs: the loss's blocks of logits, and the whole peak, in GB."""
    heads = " | ".join(f"{length:,} tokens" for length in LENGTHS)
    lines = [f"| pair | in GB | {heads} |", "|---" * (2 + len(LENGTHS)) + "|"]
    for name, pair in PAIRS.items():
        runs = [make_run(*pair, 64, micro_batch_size=1, sequence_length=length) for length in LENGTHS]
        losses = [next(m.parts[LOSS] for m in run.moments if m.name == "student's loss") for run in runs]
        logits = [2 * run.vocab_size * run.sequence_length * FLOAT32 for run in runs]
        for label, sizes in {
            "both logits, if they were held": logits,
            "the loss's blocks": losses,
            "the peak of a GPU": [run.peak.total for run in runs],
        }.items():
            lines.append(f"| {name} | {label} | {' | '.join(f'{size / GB:.1f}' for size in sizes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, pair in PAIRS.items():
        print(f"{name}, 4 x 2,048 tokens a micro-batch of each GPU, bf16-true:\n{network_table(*pair)}\n")
    print(f"Cached teachers, 64 GPUs:\n{reading_table()}\n")
    print(f"Predicted GB of each GPU, 4 x 2,048 tokens, bf16-true, activation checkpointing:\n{memory_table()}\n")
    print(f"One sample a micro-batch, 64 GPUs, bf16-true, activation checkpointing:\n{length_table()}")
