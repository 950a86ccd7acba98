"""A teacher whose shards lie in CPU memory: the same steps, its weights off the devices, and refused elsewhere."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers.memory_runs import LLAMA_70B, ON_GPUS, OPTIONS
from helpers.ranks import in_processes
from helpers.runs import difference, distil, train_args
from litgpt.config import Config
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.config.recipe import differences, recipe_as_yaml
from litgpt_akl.data.steps import MicroBatch, StepBatch
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import GATHERED, GB, TEACHER
from litgpt_akl.memory.fit import ways_out
from litgpt_akl.messages import UserError
from litgpt_akl.models.gpt import build_model, empty_weights, hidden_states, set_up_teacher
from litgpt_akl.models.parallel import gather_full, load_weights, make_strategy, reshard, unwrap
from litgpt_akl.teacher.cache import Caches
from litgpt_akl.teacher.teacher import Teacher
from litgpt_akl.training.loop import take_step


def are_offloaded(model: torch.nn.Module) -> set[bool]:
    """Of the groups of parameters that are gathered together, whether they lie in CPU memory."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    policies = [module._get_fsdp_state()._fsdp_param_group.offload_policy for module in sharded]
    return {isinstance(policy, CPUOffloadPolicy) for policy in policies}


def take_one_step(directories: dict[str, Path], tied: bool, path: Path, nodes: int, offload: bool) -> None:
    """Writes a sharded teacher, its hidden states in this process, and the student after a step.

    Args:
        directories: of student and teacher.
        tied: whether embeddings and LM head of each are one matrix.
        path: of a directory for the file.
        nodes: of two processes each; several are replicas.
        offload: whether the teacher lies in CPU memory.
    """
    torch.set_num_threads(1)
    strategy = make_strategy(2, nodes, nodes > 1, offload)
    fabric = L.Fabric(accelerator="cpu", devices=2, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    models, vocab_size = {}, 0
    for role, directory in directories.items():
        config = Config.from_file(directory / "model_config.yaml")
        vocab_size = config.vocab_size
        with empty_weights(fabric):
            model = build_model(config, tied)
        models[role] = set_up_teacher(fabric, model) if role == "teacher" else fabric.setup_module(model)
        weights = torch.load(directory / "lit_model.pth", mmap=True, weights_only=True)
        load_weights(models[role], weights if fabric.is_global_zero else None)
    assert are_offloaded(models["teacher"]) == {offload} and are_offloaded(models["student"]) == {False}
    teacher = {name: gather_full(parameter) for name, parameter in models["teacher"].named_parameters()}
    assert len(teacher) == len(weights) - tied
    ids = torch.randint(vocab_size, (2, 30), generator=torch.Generator().manual_seed(fabric.global_rank))
    positions = torch.tensor([0, 3, 29, 31, 50])
    hidden = hidden_states(models["teacher"], ids, positions)
    reshard(models["teacher"])
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(models["student"].parameters(), lr=1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    asked = {"teacher": Teacher(fabric, models["teacher"]), "caches": Caches(), "aligned": None}
    state = {**models, **asked, "optimizer": optimizer, "scheduler": scheduler, "vocab_size": vocab_size}
    tokens = 5 * fabric.world_size
    step_batch = StepBatch(
        0, 0, np.arange(4), tokens, tokens, tokens, [MicroBatch(ids, positions, ids.flatten()[positions])]
    )
    result = take_step(fabric, state | {"loss": DistillationLoss(compile=False)}, step_batch, max_norm=1.0)
    student = {name: gather_full(parameter) for name, parameter in unwrap(models["student"]).named_parameters()}
    found = {"teacher": teacher, "student": student, "hidden": hidden, "means": result.means, "loss": result.loss}
    torch.save(found, path / f"{offload}-{fabric.global_rank}.pth")


# on CUDA they would be copied; here it is to be seen that they are loaded, gathered and let go as others are
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_in_cpu_memory_teaches_bit_for_bit_the_same(
    student_dir, untied_student_dir, teacher_dir, tmp_path, tied, nodes
):
    student, teacher = (student_dir, teacher_dir) if tied else (untied_student_dir, untied_student_dir)
    roles = {"student": student, "teacher": teacher}
    for offload in (False, True):
        in_processes(2 * nodes, partial(take_one_step, roles, tied, tmp_path, nodes, offload), nodes=nodes)
    weights = {role: torch.load(directory / "lit_model.pth", weights_only=True) for role, directory in roles.items()}
    for rank in range(2 * nodes):
        plain, offloaded = (torch.load(tmp_path / f"{offload}-{rank}.pth") for offload in (False, True))
        assert torch.equal(plain["hidden"], offloaded["hidden"])
        assert all(plain[name] == offloaded[name] for name in ("means", "loss"))
        assert difference(plain["student"], offloaded["student"]) == 0
        assert all(torch.equal(value, weights["teacher"][name]) for name, value in offloaded["teacher"].items())
        assert any(not torch.equal(value, weights["student"][name]) for name, value in offloaded["student"].items())


def estimate_run(**changes) -> None:
    """Only an estimate, for GPUs that are not here."""
    options = {"devices": 8, "teacher": TeacherArgs(cpu_offload=True), "device_memory": 80.0, "dry_run": True}
    options["train"] = train_args(max_seq_length=512)
    setup(Path("Llama-3.1-8B"), **{"teacher_checkpoint_dir": Path("Llama-3.1-70B"), **options, **changes})


def test_it_is_refused_where_it_cannot_be_had_or_saves_nothing(student_dir, teacher_dir, alice_json, tmp_path):
    for changes, message in (
        ({"devices": 1}, "for several devices, and this run has 1. Use --teacher.quantize"),
        (
            {"devices": 1, "teacher": TeacherArgs(cpu_offload=True, quantize="nf4")},
            "--teacher.cpu_offload true with --teacher.quantize nf4: .* Leave one of them out",
        ),
        ({"device_memory": None}, "is for GPUs, and this run is on a CPU"),
        (
            {"teacher_checkpoint_dir": Path("Llama-3.1-8B"), "lora": LoRAArgs(r=8), "precision": "bf16-true"},
            "the teacher is the LoRA student's base, held in memory once",
        ),
    ):
        with pytest.raises(UserError, match=message):
            estimate_run(**changes)
    run = partial(distil, student_dir, teacher_dir, alice_json, tmp_path / "out", teacher=TeacherArgs(cpu_offload=True))
    for devices in (1, 2):
        with pytest.raises(UserError, match="is for GPUs, and this run is on a CPU"):
            run(devices=devices)
    base = TeacherArgs(cpu_offload=True, use_base=True, precision="bf16-true")
    changes = {"teacher_checkpoint_dir": None, "lora": LoRAArgs(r=8)}
    with pytest.raises(UserError, match="held in memory once"):
        estimate_run(**changes, teacher=base, precision="bf16-true")
    # a base in another precision than the student's is a teacher of its own
    estimate_run(**changes, teacher=base, precision="32-true")
    assert not (tmp_path / "out").exists()


def test_on_the_devices_is_only_what_is_gathered(capsys):
    for before, after in zip(ON_GPUS.moments, replace(ON_GPUS, cpu_offload=True).moments, strict=True):
        assert after.parts[TEACHER] == 0 < before.parts[TEACHER]
        # embeddings, head and the last norm in bfloat16 are the most that a device brings its share of at a time
        root = 2 * (2 * LLAMA_70B.padded_vocab_size + 1) * LLAMA_70B.n_embd
        copied = root / 8 if after.name == "teacher's forward" else 0
        assert after.parts == before.parts | {TEACHER: 0, GATHERED: before.parts[GATHERED] + copied}
    estimate_run()
    printed = capsys.readouterr().out
    assert "taught by Llama-3.1-70B in bf16, from CPU memory;" in " ".join(printed.split()) and TEACHER not in printed


def test_it_is_a_way_out_for_several_gpus():
    option, offloaded = "--teacher.cpu_offload true", replace(ON_GPUS, cpu_offload=True)
    need = offloaded.peak.total
    assert need < ON_GPUS.peak.total - 10 * GB
    assert (option, need) in ways_out(ON_GPUS, need, OPTIONS)
    for changes in ({"device": "cpu"}, {"devices": 1}, {"cpu_offload": True}, {"shares_base": True}):
        estimate = replace(ON_GPUS, **changes)
        assert option not in dict(ways_out(estimate, estimate.peak.total, OPTIONS))


def test_a_run_may_go_on_with_it():
    recipes = [recipe_as_yaml({"teacher": TeacherArgs(cpu_offload=offload)}) for offload in (False, True)]
    assert recipes[0] != recipes[1] and differences(*recipes) == []
