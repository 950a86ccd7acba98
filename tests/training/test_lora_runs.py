"""Runs with a LoRA student: in any number of processes, resumed, taught by its own base, taken by LitGPT."""

import json
import os
import shutil
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import lightning as L
import materials
import pytest
import torch
from helpers.litgpt_commands import GREEDY, QUESTION, litgpt, training_options
from helpers.lora_cases import IDS, TARGETS, adapted, litgpt_lora_model, litgpt_model, read, read_adapters
from helpers.marks import with_all_slow_but
from helpers.memory_runs import held
from helpers.ranks import in_fresh_processes, in_processes
from helpers.runs import assert_same, difference, distil, metrics
from helpers.sharding import RATE, UNEVEN, losses_in
from litgpt.model import GPT
from litgpt.scripts.merge_lora import merge_lora
from torch._subclasses import FakeTensor

from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.messages import UserError
from litgpt_akl.models.lora import adapters_of
from litgpt_akl.models.parallel import return_freed_memory
from litgpt_akl.training import main as run_module
from litgpt_akl.training import reporting
from litgpt_akl.training.checkpoint import random_state


def train(lora: LoRAArgs, student: Path, teacher_dir: Path | None, data, out_dir: Path, **changes) -> None:
    torch.set_num_threads(1)
    changes = {"train": UNEVEN, "optimizer": RATE, **changes}
    if teacher_dir is None:
        changes["teacher"] = TeacherArgs(use_base=True)
    distil(student, teacher_dir, data, out_dir, lora=lora, **changes)


@pytest.fixture
def states() -> list[dict]:
    """What the runs of a test have trained."""
    found, make_state = [], run_module.make_state

    def make_and_keep_state(*arguments) -> dict:
        found.append(make_state(*arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_state", make_and_keep_state)
        yield found


@pytest.mark.parametrize("targets", ["default", "all"])
def test_the_loss_falls_and_the_base_stays_as_it_was(states, student_dir, teacher_dir, alice_json, tmp_path, targets):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.1}}
    changes = {"train": {"max_steps": 40}, "optimizer": optimizer, "eval": {"interval": 20, "max_new_tokens": 4}}
    train(LoRAArgs(r=8, **TARGETS[targets]), student_dir, teacher_dir, alice_json, tmp_path, **changes)
    losses = [row["val_loss"] for row in metrics(tmp_path) if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.05
    student, start, final = states[0]["student"].eval(), read(student_dir), tmp_path / "final"
    trained = {name for name, parameter in student.module.named_parameters() if parameter.requires_grad}
    assert trained == adapters_of(student).keys() == read_adapters(final).keys()
    assert len(states[0]["optimizer"].param_groups[0]["params"]) == len(trained)
    for name, parameter in student.module.named_parameters():
        expected = read_adapters(final)[name] if name in trained else start[name.replace(".linear.", ".")]
        assert torch.equal(parameter.detach(), expected), name
    with torch.no_grad():
        assert (litgpt_model(final, read(final))(IDS) - student(IDS)).abs().max() < 1e-5


CLIPPED = 0.01
"""A norm that every step's gradient exceeds."""

RUNS = {
    "tied": ("student_dir", "default", "teacher_dir"),
    "untied": ("untied_student_dir", "all", "teacher_dir"),
    "tied, head": ("student_dir", "all", "teacher_dir"),
    "the base as teacher": ("student_dir", "all", None),
}


@pytest.mark.parametrize("run", with_all_slow_but(("the base as teacher",), RUNS))
def test_many_processes_take_the_steps_of_one(request, run, alice_json, tmp_path):
    source, targets, teacher = RUNS[run]
    source, teacher = request.getfixturevalue(source), teacher and request.getfixturevalue(teacher)
    start = partial(train, adapted(targets), source, teacher, alice_json, train=UNEVEN | {"max_norm": CLIPPED})
    directories = {processes: tmp_path / str(processes) for processes in (1, 2, 4)}
    for processes, directory in directories.items():
        in_processes(processes, partial(start, directory, devices=processes))
    rows = metrics(directories[1])
    assert min(row["gradient_norm"] for row in rows if "gradient_norm" in row) > CLIPPED
    for processes in (2, 4):
        for reader in (read, read_adapters):
            one, many = (reader(directories[number] / "final") for number in (1, processes))
            assert difference(one, many) < 1e-6
        for expected, row in zip(rows, metrics(directories[processes]), strict=True):
            names = [name for name in expected if name == "loss" or name.startswith("val_")]
            assert {name: row[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-4, abs=1e-5, nan_ok=True
            )


def test_the_base_teaches_as_a_copy_of_it_would(states, student_dir, alice_json, tmp_path):
    copy, lora = shutil.copytree(student_dir, tmp_path / "copied"), adapted("all", dropout=0.05)
    teachers = {"asked": None, "given": student_dir, "copy": copy}
    for name, teacher in teachers.items():
        train(lora, student_dir, teacher, alice_json, tmp_path / name)
    assert [state["teacher"].model is state["student"] for state in states] == [True, True, False]
    for name in ("given", "copy"):
        assert_same(tmp_path / "asked", tmp_path / name)
    # in a precision of its own it is a model of its own
    precise = {"teacher": TeacherArgs(precision="bf16-true"), "train": UNEVEN | {"max_steps": 1}}
    train(lora, student_dir, student_dir, alice_json, tmp_path / "precise", **precise)
    assert states[-1]["teacher"].model is not states[-1]["student"]


@pytest.fixture(scope="module")
def runs_by_precision(student_dir, alice_json, tmp_path_factory):
    """Losses of a run of 10 steps and its directory, by processes and precision; what was run once is read."""
    base = tmp_path_factory.mktemp("precisions")
    steps = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2}

    def losses(processes: int, precision: str) -> tuple[list[float], Path]:
        run = partial(train, adapted("all"), student_dir, None, alice_json, train=steps, devices=processes)
        out_dir = base / f"{processes}-{precision}"
        return losses_in(precision, run, out_dir, processes), out_dir

    return cache(losses)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("precision", [pytest.param("bf16-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_half_precision_follows_float32(runs_by_precision, precision, processes):
    (expected, _), (found, out_dir) = (runs_by_precision(processes, name) for name in ("32-true", precision))
    assert len(found) == 10 and found == pytest.approx(expected, rel=0.02)
    assert found != expected
    dtypes = {weight.dtype for weight in read(out_dir / "final").values()}
    assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


LARGE = replace(materials.STUDENT_CONFIG, n_layer=6, n_embd=768, head_size=64, n_head=12, intermediate_size=2048)
"""In float32 153 MB, in matrices of which even a half is a block of memory of its own."""


def measure(source: Path, teacher: Path | None, data: Path, out_dir: Path, devices: int) -> None:
    """Writes by how many bytes this process grows when it is given the models, and ends the run."""
    make_state = run_module.make_state
    return_freed_memory()

    def make_state_measured(fabric: L.Fabric, *arguments) -> NoReturn:
        # what was freed before would be taken again, unseen
        before = held()
        _kept = make_state(fabric, *arguments)
        out_dir.with_suffix(f".{fabric.global_rank}").write_text(str(held() - before))
        # what follows is not measured
        fabric.barrier()
        raise SystemExit

    run_module.make_state = make_state_measured
    short = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    unseen = {"initial_validation": False, "final_validation": False}
    train(adapted("default"), source, teacher, data, out_dir, train=short, eval=unseen, devices=devices)


@pytest.mark.parametrize("processes", [1, 2])
def test_base_and_teacher_are_held_in_memory_once(alice_json, tmp_path, processes):
    source = tmp_path / "large"
    materials.write_checkpoint(source, LARGE, GPT(LARGE).state_dict(), tied=False)
    size = (source / "lit_model.pth").stat().st_size / processes
    copy = shutil.copytree(source, tmp_path / "copy")
    for teacher, times in ((None, 1), (copy, 2)):
        out_dir = tmp_path / f"teacher-{times}"
        in_fresh_processes(processes, measure, source, teacher, alice_json, out_dir, processes)
        for rank in range(processes):
            growth = int(out_dir.with_suffix(f".{rank}").read_text())
            assert growth == pytest.approx(times * size, rel=0.1)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_ends_as_an_undisturbed_one(student_dir, alice_json, tmp_path, processes):
    lora, options = adapted("all", dropout=0.1), {"train": UNEVEN | {"save_interval": 4}, "devices": processes}
    run = partial(train, lora, student_dir, None, alice_json, **options)
    in_processes(processes, partial(run, tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "step-000008"
    in_processes(processes, partial(run, tmp_path / "resumed", resume=checkpoint))
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    adapters = [read_adapters(tmp_path / name / "final") for name in ("whole", "resumed")]
    assert difference(*adapters) == 0
    assert difference(read_adapters(checkpoint), adapters[0]) > 1e-5
    # a student on the way is a checkpoint like any other
    with torch.no_grad():
        logits = litgpt_lora_model(student_dir, lora, read_adapters(checkpoint))(IDS)
        assert (litgpt_model(checkpoint, read(checkpoint))(IDS) - logits).abs().max() < 1e-5


def record_draws(out_dir: Path, processes: int, student: Path, data: Path, **changes) -> None:
    """Writes what each process of a run draws: its masks of dropout, examples, and what it would draw next."""
    masks, examples, find_example = [], [], reporting.find_example

    def keep_mask(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        # the memory is predicted by a step without numbers
        real = not isinstance(output, FakeTensor)
        if real and isinstance(module, torch.nn.Dropout) and module.training and torch.is_grad_enabled():
            masks.append(output == 0)

    def keep_example(*arguments) -> reporting.Example:
        found = find_example(*arguments)
        examples.append(found.prompt)
        return found

    reporting.find_example = keep_example
    torch.nn.modules.module.register_module_forward_hook(keep_mask)
    steps = {"global_batch_size": 6, "micro_batch_size": 1, "max_steps": 4, "save_interval": 2}
    options = {"train": steps, "eval": {"interval": 1, "max_new_tokens": 4, "evaluate_example": "random"}}
    train(adapted("all", dropout=0.5), student, None, data, out_dir / "run", devices=processes, **options, **changes)
    rank = int(os.environ["RANK"])
    torch.save({"masks": masks, "examples": examples, "random": random_state()}, out_dir / f"{rank}.pth")


def test_processes_draw_masks_of_their_own_and_all_else_together(student_dir, tmp_path, pytestconfig):
    (tmp_path / "data").mkdir()
    record = {"instruction": "Who are you?", "input": "", "output": "A cat, and a grin without one, as you see."}
    for name in ("train", "val"):
        # one record many times, so that all masks have the same shapes, but prompts that tell examples apart: an "i"
        # would be a token more
        records = [record | {"instruction": f"Who are you {letter}?"} for letter in "abcdefghjklm"]
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(records))
    found, resumed = {}, tmp_path / "2" / "run" / "step-000002"
    runs = [
        ("1", 1, {}),
        ("2", 2, {}),
        ("2 resumed", 2, {"resume": resumed}),
    ]
    more, again = [], []
    if pytestconfig.option.all:
        more = [("3 resumed", 3, {"resume": resumed})]
        again = [("2 again", 2, {}), ("3 resumed again", 3, {"resume": resumed})]
    for name, processes, changes in [*runs, *more, *again]:
        (tmp_path / name).mkdir()
        in_processes(
            processes, partial(record_draws, tmp_path / name, processes, student_dir, tmp_path / "data", **changes)
        )
        found[name] = [torch.load(tmp_path / name / f"{rank}.pth", weights_only=False) for rank in range(processes)]

    def alike(one: dict, other: dict) -> float:
        """The share of two processes' masks that is the same."""
        pairs = [(a, b) for a, b in zip(one["masks"], other["masks"], strict=False) if a.shape == b.shape]
        assert len(pairs) == min(len(one["masks"]), len(other["masks"])) > 10
        return sum((a == b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    for several in found.values():
        for one, other in combinations(several, 2):
            assert alike(one, other) == pytest.approx(0.5, abs=0.02)
            assert not torch.equal(one["random"]["torch"], other["random"]["torch"])
            for name in ("python", "numpy"):
                assert one["random"][name] == other["random"][name]
            assert len(one["examples"]) == len(other["examples"]) > 0
            assert all(map(torch.equal, one["examples"], other["examples"]))
    # the first process draws what a lone one does
    assert alike(found["1"][0], found["2"][0]) == 1
    for name, *_ in again:
        for one, other in zip(found[name.removesuffix(" again")], found[name], strict=True):
            assert alike(one, other) == 1
    for whole, rest in zip(found["2"], found["2 resumed"], strict=True):
        assert alike({"masks": whole["masks"][-len(rest["masks"]) :]}, rest) == 1
    for name, *_ in more:
        assert all(alike(*pair) == 1 for pair in zip(found["2 resumed"], found[name], strict=False))


def test_what_is_trained_cannot_change_in_a_run(student_dir, teacher_dir, alice_json, tmp_path):
    options = {"train": UNEVEN | {"max_steps": 2, "save_interval": 1}}
    run = partial(train, student=student_dir, teacher_dir=teacher_dir, data=alice_json, **options)
    for name, lora in {"lora": adapted("default"), "whole": LoRAArgs()}.items():
        run(lora, out_dir=tmp_path / name)
    cases = [("lora", LoRAArgs()), ("lora", adapted("default", r=2)), ("whole", adapted("default"))]
    for name, lora in cases:
        resumed = partial(run, lora, out_dir=tmp_path / "other", resume=tmp_path / name / "step-000001")
        with pytest.raises(UserError, match="another result: lora.r"):
            resumed()
        with pytest.raises(UserError, match=r"step-000001 was saved with other --lora options"):
            resumed(accept_changes=True)


def test_litgpt_takes_the_student_and_its_adapters(student_dir, teacher_dir, alice_json, tmp_path):
    options = training_options(alice_json, learning_rate=1e-3, max_steps=4)
    options += ["--lora.r", "4", "--lora.mlp", "true", "--teacher.use_base", "true", "--distill.compile", "false"]
    litgpt("finetune_akl", teacher_dir, *options, "--out_dir", tmp_path, directory=tmp_path)
    final = tmp_path / "final"
    model = litgpt_lora_model(teacher_dir, LoRAArgs(r=4, mlp=True), read_adapters(final)).double()
    with torch.no_grad():
        # in float32 this model's logits, up to 23, are themselves off by 1.2e-5
        assert (litgpt_model(final, read(final)).double()(IDS) - model(IDS)).abs().max() < 1e-5
    reply = litgpt("chat", final, *GREEDY, directory=tmp_path, stdin=f"{QUESTION}\n\n").split(">> Reply: ")[1]
    generated = litgpt("generate", final, "--prompt", QUESTION, *GREEDY, directory=tmp_path)
    assert reply.split("\n")[0] and reply.split("\n")[0] == generated.rpartition(QUESTION)[2].split("\n")[0]
    merged = read(final)
    (final / "lit_model.pth").unlink()
    # what LitGPT's own command writes beside its adapters
    described = {"checkpoint_dir": str(teacher_dir), "lora_r": 4, "lora_mlp": True, "precision": "32-true"}
    described |= {"lora_alpha": 16, "lora_query": True, "lora_value": True}
    (final / "hyperparameters.yaml").write_text(json.dumps(described))
    merge_lora(final)
    assert difference(read(final), merged) < 1e-6


def test_the_base_is_the_teacher_only_if_asked_for(student_dir, teacher_dir, alice_json, tmp_path):
    run = partial(distil, student_dir, data=alice_json, out_dir=tmp_path / "out")
    base, lora = TeacherArgs(use_base=True), LoRAArgs(r=8)
    for teacher, options, message in (
        (None, {"lora": lora}, "--teacher_checkpoint_dir is missing.*--teacher.use_base true"),
        (None, {}, "--teacher_checkpoint_dir is missing"),
        (None, {"teacher": base}, "--teacher.use_base true without --lora.r"),
        (teacher_dir, {"teacher": base, "lora": lora}, f"--teacher_checkpoint_dir {teacher_dir} are two teachers"),
        (teacher_dir, {"lora": LoRAArgs(r=8, head=True), "train": {"tie_embeddings": True}}, "are not one matrix"),
    ):
        with pytest.raises(UserError, match=message):
            run(teacher, **options)
    assert not (tmp_path / "out").exists()
