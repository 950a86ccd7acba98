"""What scripts/benchmarks/scale.py says is sent, against what processes send; and the operations of experts."""

import math
from collections import Counter
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import scale
import torch
from gpu_benchmark import flops
from gpu_benchmark.runs import make_estimate, make_state, steps_of
from helpers.memory_runs import model
from helpers.ranks import in_processes
from litgpt.config import Config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.models.gpt import build_model
from litgpt_akl.models.parallel import make_strategy
from litgpt_akl.training.loop import take_step

MICRO_BATCHES = 2
"""Of a step in each process."""


class Collectives(TorchDispatchMode):
    """Counts the calls in which processes exchange tensors, and the bytes of what each leaves in a process."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sizes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.__name__.partition(".")[0]
            # a number or two are told apart from what a model weighs
            results = args[0] if isinstance(args[0], list) else [args[0]]
            self.calls[name] += 1
            self.sizes[name] += sum(t.nbytes for t in results if isinstance(t, torch.Tensor) and t.numel() > 100)
        return function(*args, **(kwargs or {}))


def estimate_of(processes: int, nodes: int, **options) -> MemoryEstimate:
    """A run of two models whose sizes all numbers of processes divide."""
    shape = {"micro_batch_size": 2, "sequence_length": 16, "global_batch_size": 2 * MICRO_BATCHES * processes}
    machine = {"devices": processes // nodes, "num_nodes": nodes}
    return make_estimate(model(3, 64, 512), model(2, 128, 512), **shape, **machine, **options)


def count(estimate: MemoryEstimate, out: Path) -> None:
    """Count one step of a process."""
    torch.set_num_threads(1)
    strategy = make_strategy(estimate.devices, estimate.num_nodes, estimate.hybrid_sharding)
    machine = {"devices": estimate.devices, "num_nodes": estimate.num_nodes, "strategy": strategy}
    fabric = L.Fabric(accelerator="cpu", precision=estimate.precision, **machine)
    fabric.launch()
    state = make_state(fabric, estimate)
    # the first step asks more of a process than those that follow
    first, second = steps_of(estimate, 2)
    take_step(fabric, state, first, max_norm=1.0)
    with Collectives() as found:
        take_step(fabric, state, second, max_norm=1.0)
    torch.save((dict(found.calls), dict(found.sizes)), out / f"{fabric.global_rank}.pth")


CASES = [
    pytest.param(2, 1, {}, id="2 processes"),
    pytest.param(2, 1, {"teacher_role": "cached", "precision": "bf16-mixed"}, id="cached", marks=pytest.mark.slow),
    pytest.param(
        2,
        1,
        {"precision": "bf16-true", "teacher_dtype": torch.bfloat16, "activation_checkpointing": True},
        id="half precision, activation checkpointing",
        marks=pytest.mark.slow,
    ),
    pytest.param(4, 2, {"hybrid_sharding": True, "student_tied": True}, id="2 nodes of 2, hybrid, tied"),
    pytest.param(4, 2, {}, id="2 nodes of 2", marks=pytest.mark.slow),
    pytest.param(8, 1, {"student_tied": True}, id="8 processes, tied", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("processes", "nodes", "options"), CASES)
def test_what_is_sent_is_what_is_said(tmp_path, processes, nodes, options):
    estimate = estimate_of(processes, nodes, **options)
    in_processes(processes, partial(count, estimate, tmp_path), nodes=nodes)
    sent, others = scale.traffic(estimate), (estimate.shards - 1) / estimate.shards
    for rank in range(processes):
        calls, sizes = torch.load(tmp_path / f"{rank}.pth")
        # gathered is what then is whole, of which a process had its own part
        gathered = others * sizes["_allgather_base_"]
        assert gathered == pytest.approx(MICRO_BATCHES * (sent.teacher + sent.student), rel=1e-12)
        # what sums leave is a part, and the others' parts are sent
        summed = (estimate.shards - 1) * sizes["_reduce_scatter_base_"]
        assert summed == pytest.approx(MICRO_BATCHES * sent.gradients, rel=1e-12)
        replicas = estimate.processes // estimate.shards
        over_nodes = 2 * (replicas - 1) / replicas * sizes.get("allreduce_", 0)
        assert over_nodes == pytest.approx(MICRO_BATCHES * sent.replicas, rel=1e-12)
        blocks = estimate.student.n_layer * 2 + estimate.teacher.n_layer * (estimate.teacher_role == "live")
        assert calls["_allgather_base_"] == MICRO_BATCHES * (blocks + 2)
        assert calls["_reduce_scatter_base_"] == MICRO_BATCHES * (estimate.student.n_layer + 1)
        # sums of a step are asked for without a barrier before
        assert "barrier" not in calls


def test_of_experts_only_those_that_are_asked_are_counted():
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "head_size": 16, "intermediate_size": 96}
    vocabulary = {"vocab_size": 128, "padded_vocab_size": 128, "block_size": 64}
    for experts, asked in ((8, 2), (4, 1)):
        chosen = {"n_expert": experts, "n_expert_per_token": asked, "moe_intermediate_size": 32}
        config = Config.from_name("Qwen3-30B-A3B", **sizes, **vocabulary, **chosen)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            build_model(config, False)(torch.randint(128, (2, 24)))
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.values()) - counts[torch.ops.aten.bmm] // 2
        assert flops.body_forward(config, False, 2, 24) + flops.head_forward(config, 48) == counted


def test_more_gpus_send_more_and_a_cached_teacher_less():
    pair = scale.PAIRS["Llama 70B into 8B"]
    live = [sum(scale.traffic(scale.make_run(*pair, gpus))) for gpus in (1, 8, 64, 512)]
    cached = [sum(scale.traffic(scale.make_run(*pair, gpus, teacher_role="cached"))) for gpus in (8, 64)]
    assert live[0] == 0 and live == sorted(live) and cached[0] < live[1] / 3 and cached[1] < live[2] / 3
    # per token it is the less, the more tokens a micro-batch has
    few, many = (scale.make_run(*pair, 64, micro_batch_size=size) for size in (1, 8))
    assert sum(scale.traffic(few)) == sum(scale.traffic(many))
    assert scale.seconds(many)[0] > 7 * scale.seconds(few)[0] and math.isfinite(scale.seconds(few)[1])
