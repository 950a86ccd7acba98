"""One process and many take the same steps and write the same student."""

import json
import math
import random
from functools import cache, partial
from itertools import product
from pathlib import Path

import lightning as L
import materials
import pytest
import torch
from helpers.marks import with_all_slow_but
from helpers.memory_runs import watched
from helpers.ranks import in_fresh_processes, in_processes
from helpers.runs import assert_same, difference, distil, final, metrics
from helpers.sharding import RATE, UNEVEN, losses_in
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.distillation import ScheduleArgs
from litgpt_akl.data import StreamingSFT
from litgpt_akl.models.gpt import build_model, empty_weights, hidden_states, set_up_teacher
from litgpt_akl.models.parallel import load_weights, make_strategy, reshard, return_freed_memory
from litgpt_akl.models.tensor_file import tensor_file


def train(student, teacher_dir, data, out_dir, train=UNEVEN, **changes):
    torch.set_num_threads(1)
    return distil(student, teacher_dir, data, out_dir, train=train, optimizer=RATE, **changes)


@pytest.fixture(scope="module")
def one(request, student_dir, untied_student_dir, teacher_dir, alice_json, tmp_path_factory):
    """A student, and what one process makes of it."""
    student = student_dir if request.param == "tied" else untied_student_dir
    out_dir = tmp_path_factory.mktemp("one") / "run"
    return student, train(student, teacher_dir, alice_json, out_dir), metrics(out_dir)


CASES = {
    "2 processes": {"devices": 2},
    # two of the four micro-batches' processes have an empty one in their place
    "3 processes": {"devices": 3},
    "4 processes": {"devices": 4},
    "2 nodes of 2": {"devices": 2, "num_nodes": 2},
    "2 nodes of 2, hybrid": {"devices": 2, "num_nodes": 2, "hybrid_sharding": True},
    "a process without data": {"devices": 2, "train": UNEVEN | {"micro_batch_size": 7}},
    "activation checkpointing": {"devices": 1, "activation_checkpointing": True},
    "activation checkpointing in 2 processes": {"devices": 2, "activation_checkpointing": True},
    "compiled blocks": {"devices": 1, "compile": True},
    "one record at a time": {"devices": 2, "train": UNEVEN | {"micro_batch_size": 1}},
}


SLOW = (
    "3 processes",
    "4 processes",
    "2 nodes of 2",
    "one record at a time",
    "compiled blocks",
    "activation checkpointing",
)
FEW = {
    *(("tied", case) for case in CASES if case not in SLOW),
    ("untied", "2 processes"),
}


@pytest.mark.parametrize(("one", "case"), with_all_slow_but(FEW, product(("tied", "untied"), CASES)), indirect=["one"])
def test_many_processes_take_the_steps_of_one(one, case, teacher_dir, alice_json, tmp_path):
    student, weights, rows = one
    options = CASES[case]
    nodes = options.get("num_nodes", 1)
    run = partial(train, student, teacher_dir, alice_json, tmp_path / "many", **options)
    in_processes(options["devices"] * nodes, run, nodes=nodes)
    many = torch.load(tmp_path / "many" / "final" / "lit_model.pth", weights_only=True)
    assert difference(weights, many) < 1e-6
    assert max(row["gradient_norm"] for row in rows if "gradient_norm" in row) > UNEVEN["max_norm"]
    same_validation = options.get("train", UNEVEN) is UNEVEN
    for expected, row in zip(rows, metrics(tmp_path / "many"), strict=True):
        if not same_validation and "loss" not in row:
            # its records are counted in micro-batches
            continue
        varying = {"memory_gb", "tokens_per_second", "response_tokens_per_second", "seconds_per_step", "padding"}
        expected = {name: value for name, value in expected.items() if name not in varying}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["csd", "drkl", "tad"])
def test_objectives_of_labels_and_sequences(divergence, student_dir, teacher_dir, alice_json, tmp_path):
    """Two processes, other micro-batches, a cached teacher, responses of the student's own, and a schedule."""
    distill = {"divergence": divergence, "on_policy": 0.5, "on_policy_tokens": 8}
    distill["schedule"] = ScheduleArgs(temperature=(2.0, 1.0))
    options = {"distill": distill, "train": UNEVEN}
    expected = train(student_dir, teacher_dir, alice_json, tmp_path / "one", **options)
    options |= {"train": UNEVEN | {"micro_batch_size": 3}, "devices": 2}
    options["teacher"] = TeacherArgs(cache_dir=str(tmp_path / "cache"))
    run = partial(train, student_dir, teacher_dir, alice_json, tmp_path / "many", **options)
    in_processes(2, run)
    assert difference(expected, final(tmp_path / "many")) < 1e-6


@pytest.mark.parametrize("one", ["tied", pytest.param("untied", marks=pytest.mark.slow)], indirect=True)
def test_the_shape_of_batches_does_not_matter_to_one_process(one, teacher_dir, alice_json, tmp_path):
    student, weights, _ = one
    for size in (1, 3, 7):
        again = train(student, teacher_dir, alice_json, tmp_path / str(size), train=UNEVEN | {"micro_batch_size": size})
        assert difference(weights, again) < 1e-6


SAVING = UNEVEN | {"save_interval": 4, "max_steps": 10}


def test_many_processes_go_on_as_if_never_interrupted(student_dir, teacher_dir, alice_json, tmp_path):
    run = partial(train, student_dir, teacher_dir, alice_json, train=SAVING, eval={"interval": 5})
    in_processes(2, partial(run, tmp_path / "whole", devices=2))
    checkpoint = tmp_path / "whole" / "step-000008"
    in_processes(2, partial(run, tmp_path / "resumed", devices=2, resume=checkpoint))
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    state = torch.load(checkpoint / "training_state.pth", weights_only=True)
    assert len(state["random"]) == 2
    # one process takes up what two have saved, and three what one has
    alone = run(tmp_path / "alone", resume=checkpoint)
    in_processes(3, partial(run, tmp_path / "three", devices=3, resume=checkpoint))
    for name in ("alone", "three"):
        found = torch.load(tmp_path / name / "final" / "lit_model.pth", weights_only=True)
        assert difference(alone, found) < 1e-6


@pytest.mark.parametrize("steps", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_uneven_data_never_blocks(student_dir, teacher_dir, alice_json, tmp_path, steps):
    """An epoch and a half, by number of steps."""
    draw = random.Random(5)
    words = materials.alice_text().split()
    with (tmp_path / "data.jsonl").open("w") as file:
        for _ in range(steps * 5 * 2 // 3):
            prompt, answer = (" ".join(draw.choices(words, k=draw.choice((1, 2, 5, 20)))) for _ in range(2))
            file.write(json.dumps({"instruction": prompt, "output": answer}) + "\n")
    data = StreamingSFT(str(tmp_path / "data.jsonl"), mask_prompt=True, num_workers=0, cache_dir=tmp_path / "cache")
    many = {"max_steps": steps, "global_batch_size": 5, "micro_batch_size": 1, "max_seq_length": 64}
    run = partial(train, student_dir, teacher_dir, data, tmp_path / "run", train=many, devices=3)
    in_processes(3, partial(run, eval={"interval": steps // 2, "max_new_tokens": 3}))
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def losses_by_precision(student_dir, teacher_dir, alice_json, tmp_path_factory):
    """Losses of a run of 10 steps by processes and precision; what was run once is read."""
    base = tmp_path_factory.mktemp("precisions")
    steps = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2}

    def losses(processes: int, precision: str) -> list[float]:
        run = partial(train, student_dir, teacher_dir, alice_json, train=steps, devices=processes)
        return losses_in(precision, run, base / f"{processes}-{precision}", processes)

    return cache(losses)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_half_precision_follows_float32(losses_by_precision, precision, processes):
    expected, found = (losses_by_precision(processes, name) for name in ("32-true", precision))
    assert len(found) == 10 and found == pytest.approx(expected, rel=0.02)
    assert found != expected


LARGE = Config(
    name="large",
    n_layer=24,
    n_embd=512,
    n_head=8,
    intermediate_size=1408,
    padded_vocab_size=1024,
    block_size=128,
    bias=False,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
)
"""As a teacher 311 MB in float32, 13 MB a block."""


def measure_teacher(path: Path, devices: int) -> None:
    """Writes by how many bytes a process grows while it loads a teacher, asks it for hidden states and saves it."""
    torch.set_num_threads(1)
    fabric = L.Fabric(accelerator="cpu", devices=devices, strategy=make_strategy(devices, 1, False))
    fabric.launch()
    return_freed_memory()
    with watched() as result:
        with empty_weights(fabric, torch.float32):
            teacher = build_model(LARGE, tied=False)
        teacher = set_up_teacher(fabric, teacher)
        weights = torch.load(path / "teacher.pth", mmap=True, weights_only=True) if fabric.is_global_zero else None
        load_weights(teacher, weights)
        hidden = hidden_states(teacher, torch.zeros(1, 8, dtype=torch.int64), torch.arange(8))
        reshard(teacher)
        with tensor_file(path / "saved.pth" if fabric.is_global_zero else None) as file:
            file.save({name: file.store(parameter) for name, parameter in teacher.named_parameters()})
    torch.save(result | {"hidden": hidden}, path / f"{devices}-{fabric.global_rank}.pth")


def test_no_process_ever_holds_the_whole_teacher(tmp_path):
    weights = {name: torch.randn(weight.shape) * 0.02 for name, weight in GPT(LARGE).state_dict().items()}
    torch.save(weights, tmp_path / "teacher.pth")
    for devices in (1, 4):
        in_fresh_processes(devices, measure_teacher, tmp_path, devices)
    alone = torch.load(tmp_path / "1-0.pth")
    assert alone["growth"] > 0.9 * sum(weight.nbytes for weight in weights.values())
    for rank in range(4):
        found = torch.load(tmp_path / f"4-{rank}.pth")
        assert torch.equal(found["hidden"], alone["hidden"])
        assert found["growth"] < 0.45 * alone["growth"]
    assert difference(weights, torch.load(tmp_path / "saved.pth", mmap=True, weights_only=True)) == 0
