"""What a run is predicted to take is what it takes; what cannot fit is refused with options that make it fit."""

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.memory_runs import LLAMA_8B, LLAMA_70B, ON_GPUS, OPTIONS, make_estimate, model, take_steps, write_weights
from helpers.ranks import in_fresh_processes
from helpers.runs import distil
from litgpt import lora
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.top_k import TopK
from litgpt_akl.memory.estimate import GB, GRADIENTS, LOSS, OPTIMIZER, PARTS, STUDENT, TEACHER, try_optimizer
from litgpt_akl.memory.fit import check_fit, describe_memory, report_memory, ways_out, ways_out_together
from litgpt_akl.messages import UserError
from litgpt_akl.models.pair import find_models
from litgpt_akl.training.optimizer import make_optimizer

UNTRAINED = "a large vocabulary, and a teacher that holds all ids about as probable"
MEASURED = {
    "long sequences": make_estimate(model(4, 256, 1024), model(4, 384, 1024)),
    "a large vocabulary": make_estimate(
        model(2, 256, 50_000),
        model(2, 384, 50_000),
        optimizer_is_fused=False,
        global_batch_size=2,
        micro_batch_size=1,
        sequence_length=128,
    ),
    UNTRAINED: make_estimate(
        model(2, 256, 100_000),
        model(3, 384, 100_000),
        student_tied=True,
        teacher_tied=True,
        global_batch_size=2,
        micro_batch_size=1,
        sequence_length=96,
    ),
    "a pair as in README, smaller": make_estimate(
        model(4, 320, 30_000), model(6, 768, 30_000), student_tied=True, global_batch_size=8, sequence_length=320
    ),
    "on-policy samples": make_estimate(
        model(6, 256, 4096),
        model(2, 256, 4096),
        global_batch_size=2,
        micro_batch_size=1,
        sequence_length=512,
        on_policy_prompts=24,
    ),
    "distributions on a few ids, cached": make_estimate(
        model(2, 256, 50_000),
        model(2, 384, 50_000),
        teacher_role="cached",
        top_k=TopK(64, 50_000),
        global_batch_size=2,
        micro_batch_size=1,
        sequence_length=128,
    ),
    "two processes": make_estimate(
        model(4, 512, 4096), model(5, 768, 4096), devices=2, micro_batch_size=2, sequence_length=384
    ),
    "two processes, mixed precision": make_estimate(
        model(3, 512, 1024),
        model(3, 512, 1024),
        devices=2,
        precision="bf16-mixed",
        micro_batch_size=2,
        # on some processors products in bfloat16 are so slow that more does not end in time
        sequence_length=320,
    ),
}


SLOW = {"a pair as in README, smaller", "distributions on a few ids, cached"}
"""Take some ten seconds, or are like others."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in MEASURED])
def test_the_prediction_is_within_15_percent_of_the_measured_peak(case, tmp_path):
    estimate = MEASURED[case]
    write_weights(tmp_path / "student.pth", estimate.student, estimate.student_tied)
    write_weights(tmp_path / "teacher.pth", estimate.teacher, estimate.teacher_tied, trained=case != UNTRAINED)
    small = {"student": model(1, 64, 128), "teacher": model(1, 64, 128), "vocab_size": 128, "sequence_length": 16}
    assert not estimate.on_policy_prompts or estimate.peak.name == "student's on-policy samples"
    in_fresh_processes(estimate.devices, partial(take_steps, estimate, replace(estimate, **small), tmp_path))
    measured = max(torch.load(tmp_path / f"growth-{rank}.pth") for rank in range(estimate.devices))
    assert estimate.peak.total == pytest.approx(measured, rel=0.15)


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def test_weights_and_optimizer_are_shared_out_over_the_processes_that_shard():
    for shards, changes in (
        (8, {}),
        (1, {"devices": 1}),
        (16, {"num_nodes": 2}),
        (8, {"num_nodes": 2, "hybrid_sharding": True}),
    ):
        for moment in replace(ON_GPUS, **changes).moments:
            if moment.name == "optimizer's step":
                continue
            assert moment.parts[STUDENT] == 4 * parameters(LLAMA_8B) / shards
            assert moment.parts[OPTIMIZER] == 8 * parameters(LLAMA_8B) / shards
            assert moment.parts[TEACHER] == 2 * parameters(LLAMA_70B) / shards


def test_every_moment_has_all_parts():
    for moment in ON_GPUS.moments:
        assert tuple(moment.parts) == PARTS
        assert min(moment.parts.values()) >= 0
        assert moment.total == sum(moment.parts.values())


def test_a_cache_of_a_few_ids_needs_neither_the_teachers_head_nor_its_logits():
    cached = replace(ON_GPUS, teacher_role="cached")
    few = replace(cached, top_k=TopK(64, cached.vocab_size))
    assert (cached.cached_head, few.cached_head) == (2 * LLAMA_70B.padded_vocab_size * LLAMA_70B.n_embd, 0)
    moments = [{moment.name: moment.parts for moment in of.moments}["student's loss"] for of in (cached, few)]
    assert [parts[TEACHER] > 0 for parts in moments] == [True, False]
    # the student's logits, which become their gradient; of the other also the teacher's, and a gradient of its own
    assert moments[0][LOSS] == 3 * moments[1][LOSS]


def test_tied_matrices_are_counted_once():
    student = Config.from_name("Llama-3.2-1B")
    estimate = replace(ON_GPUS, student=student)
    untied, tied = (replace(estimate, student_tied=tied).moments[0].parts[STUDENT] * 8 / 4 for tied in (False, True))
    assert untied - tied == student.padded_vocab_size * student.n_embd


@pytest.mark.parametrize(
    ("optimizer", "states", "fused"),
    [
        ("AdamW", 2, True),
        ("SGD", 0, True),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}, 1, True),
        ({"class_path": "torch.optim.AdamW", "init_args": {"foreach": True}}, 2, False),
        ("RMSprop", 1, False),
    ],
)
def test_what_an_optimizer_keeps_is_found_by_a_step(optimizer, states, fused):
    found = try_optimizer(partial(make_optimizer, optimizer), torch.float32)
    assert found == (pytest.approx(states, abs=0.001), fused)


def test_memory_falls_with_what_is_meant_to_save_it():
    need = ON_GPUS.peak.total
    for changes in (
        {"devices": 16},
        {"micro_batch_size": 1},
        {"sequence_length": 256},
        {"precision": "bf16-true"},
        {"activation_checkpointing": True},
        {"optimizer_states": 1.0},
    ):
        assert replace(ON_GPUS, **changes).peak.total < need
    assert replace(ON_GPUS, teacher_dtype=torch.float32).peak.total > need


def test_lora_takes_gradients_and_optimizer_for_its_own_parameters_only():
    fields = {name: value for name, value in vars(LLAMA_8B).items() if name in Config.__dataclass_fields__}
    student = lora.Config(**fields, lora_r=8, lora_query=True, lora_value=True)
    estimate = replace(ON_GPUS, student=student)
    moments = estimate.moments
    # queries and values of 32 layers, of which the values are shared by four heads
    trained = 32 * 8 * (2 * 4096 + 4096 + 1024)
    assert moments[0].parts[GRADIENTS] == 4 * trained / 8
    assert moments[0].parts[OPTIMIZER] == 8 * trained / 8
    assert moments[0].parts[STUDENT] == 4 * (parameters(LLAMA_8B) + trained) / 8
    assert estimate.peak.total < ON_GPUS.peak.total - 8 * GB


def test_smaller_blocks_take_less():
    sizes = []
    for tokens in (256, 64):
        moments = replace(ON_GPUS, loss=DistillationLoss(block_tokens=tokens)).moments
        sizes.append(next(moment for moment in moments if moment.name == "student's loss").parts[LOSS])
    assert sizes[0] == 4 * sizes[1] > 64 * 128_256 * 4 * 2


def test_a_run_that_fits_is_not_refused():
    check_fit(ON_GPUS, ON_GPUS.peak.total, OPTIONS)


def test_each_way_out_makes_the_run_fit():
    estimate = replace(ON_GPUS, micro_batch_size=8, devices=4)
    limit = 80 * GB
    with pytest.raises(UserError, match=rf"needs {estimate.peak.total / GB:.1f} GB .* there are 80.0 GB") as error:
        check_fit(estimate, limit, OPTIONS)
    assert len(str(error.value).splitlines()) == 2
    found = ways_out(estimate, limit, OPTIONS)
    assert found and all(need <= limit and option in str(error.value) for option, need in found)
    changed = {"--precision bf16-true": {"precision": "bf16-true"}, "--devices 8": {"devices": 8}}
    for option, need in found:
        if option in changed:
            assert replace(estimate, **changed[option]).peak.total == need


def test_only_options_that_the_command_has_are_named():
    estimate = replace(ON_GPUS, micro_batch_size=4)
    limit = replace(estimate, activation_checkpointing=True).peak.total
    for options in (OPTIONS, (*OPTIONS, "activation_checkpointing")):
        named = " ".join(option for option, _ in ways_out(estimate, limit, options))
        assert ("activation_checkpointing" in named) == ("activation_checkpointing" in options)


def test_where_no_option_is_enough_several_are_named_together():
    estimate = replace(ON_GPUS, devices=2, micro_batch_size=8)
    limit = 30 * GB
    assert ways_out(estimate, limit, OPTIONS) == []
    options, need = ways_out_together(estimate, limit, OPTIONS)
    assert len(options) > 1 and need <= limit
    with pytest.raises(UserError, match=f"{re.escape(' '.join(options))} together"):
        check_fit(estimate, limit, OPTIONS)
    with pytest.raises(UserError, match="choose a smaller teacher or student"):
        check_fit(estimate, GB, OPTIONS)


def test_the_table_adds_up():
    lines = describe_memory(ON_GPUS, 80 * GB).splitlines()
    rows = [re.fullmatch(r"  (.+?) +(\d+\.\d)(?: of 80\.0)?", line) for line in lines]
    sizes = {row[1]: float(row[2]) for row in rows if row}
    assert sizes.pop("together") == pytest.approx(sum(sizes.values()), abs=0.5)
    assert set(sizes) <= set(PARTS)
    assert max(map(len, lines)) <= 80


def test_models_need_not_be_there(student_dir, teacher_dir):
    models = find_models(Path("meta-llama/Llama-3.1-8B"), Path("Llama-3.1-70B"))
    assert (models.student, models.teacher) == (LLAMA_8B, LLAMA_70B)
    assert models.student.block_size == models.teacher.block_size == 131_072
    models = find_models(student_dir, teacher_dir)
    assert (models.student.n_layer, models.teacher.n_layer, models.student_tied) == (2, 4, True)
    for path in ("Llama-3.1-9B", "somewhere/Llama-3.1-8B", "out/Llama/Llama-3.1-8B"):
        with pytest.raises(UserError, match=f"The student {path} is neither"):
            find_models(Path(path), Path("Llama-3.1-70B"))


def test_what_is_little_is_said_in_a_line_and_what_is_not_in_a_table(capsys):
    need = ON_GPUS.peak.total / GB
    for memory, in_full, is_line in ((need / 0.69, False, True), (need / 0.71, False, False), (200.0, True, False)):
        report_memory(ON_GPUS, memory, in_full)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert (len(lines) == 1) == is_line
        assert ("Predicted memory of each of 8 GPUs" in lines[0]) != is_line
        assert lines[0].startswith("Memory ") == is_line
        assert re.search(r"\b2 x 512\s+tokens", "\n".join(lines))
    with pytest.raises(UserError, match="This run needs"):
        report_memory(ON_GPUS, need - 0.1)
    assert "Predicted memory" in capsys.readouterr().out


def test_a_run_says_what_it_takes_and_is_refused_before_weights_are_read(
    student_dir, teacher_dir, alice_json, tmp_path, capsys
):
    distil(student_dir, teacher_dir, alice_json, tmp_path / "run", train={"max_steps": 1})
    printed = capsys.readouterr().out
    assert re.search(
        r"^Memory +0\.0\d\d of .* GB a device at the longest micro-batch \(4 x \d+ tokens\)$", printed, re.M
    )
    assert printed.index("\nMemory") < printed.index("\nStep    0")
    student = tmp_path / "student"
    shutil.copytree(student_dir, student)
    (student / "lit_model.pth").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"needs 0\.0\d\d GB on each process .* there are 0\.001 GB"):
        distil(student, teacher_dir, alice_json, tmp_path / "refused", device_memory=0.001)
