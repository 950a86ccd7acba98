"""Training with a cached teacher: the same numbers as with a live one, whoever filled the cache, and when."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import fsspec
import materials
import pytest
import torch
from helpers.cache_runs import RATE, TRAIN, assert_equal, chunks, fill, run
from helpers.marks import with_all_slow_but
from helpers.memory_runs import watched
from helpers.ranks import in_fresh_processes, in_processes
from helpers.runs import distil, metrics, short_data
from litgpt.model import GPT
from litgpt.prompts import Default

from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.messages import UserError
from litgpt_akl.models.parallel import return_freed_memory


@pytest.mark.parametrize(
    ("workers", "precision"),
    with_all_slow_but(((0, "32-true"), (2, "bf16-true")), product((0, 2), ("32-true", "bf16-true"))),
)
def test_a_cached_teacher_is_the_live_one_bit_for_bit(
    student_dir, teacher_dir, lone, short, tmp_path, precision, workers
):
    short.num_workers = workers
    cache, options = tmp_path / "cache", {"train": {"epochs": 1}, "teacher_precision": precision}
    live = run(student_dir, teacher_dir, short, tmp_path / "live", **options)
    filling = run(student_dir, teacher_dir, short, tmp_path / "filling", cache, **options)
    cached = run(student_dir, lone, short, tmp_path / "cached", cache, mode="read", **options)
    assert_equal(live, filling)
    assert_equal(live, cached)
    assert metrics(tmp_path / "live")[-1]["val_loss"] == metrics(tmp_path / "cached")[-1]["val_loss"]


def test_other_students_losses_and_orders_read_what_one_run_has_left(
    student_dir, untied_student_dir, teacher_dir, lone, short, tmp_path
):
    cache = tmp_path / "cache"
    run(student_dir, teacher_dir, short, tmp_path / "first", cache)
    before = {path.name: path.stat().st_mtime_ns for path in chunks(cache)}
    others = {"seed": 7, "distill": {"divergence": "rkl"}}
    others["train"] = {"micro_batch_size": 3, "global_batch_size": 9, "epochs": 1}
    found = run(untied_student_dir, lone, short, tmp_path / "second", cache, **others)
    live = run(untied_student_dir, teacher_dir, short, tmp_path / "live", **others)
    # in other micro-batches the teacher's own products are rounded otherwise
    assert_equal(live, found, within=1e-5)
    adapted = {"lora": LoRAArgs(r=4, dropout=0.0), "train": {"epochs": 1}}
    found = run(student_dir, lone, short, tmp_path / "adapted", cache, **adapted)
    assert_equal(run(student_dir, teacher_dir, short, tmp_path / "live-adapted", **adapted), found, within=1e-5)
    assert {path.name: path.stat().st_mtime_ns for path in chunks(cache)} == before


def test_jobs_fill_parts_without_a_student(student_dir, teacher_dir, lone, short, tmp_path, capsys):
    live = run(student_dir, teacher_dir, short, tmp_path / "live", train={"epochs": 1})
    parts = [tmp_path / "first", tmp_path / "second"]
    for number, part in enumerate(parts, start=1):
        fill(teacher_dir, teacher_dir, short, tmp_path / "none", part, part=f"{number}/2")
    with pytest.raises(UserError, match="lacks 22 training samples and 7 validation"):
        run(student_dir, lone, short, tmp_path / "early", parts[1], mode="read", train={"epochs": 1})
    shutil.copytree(parts[1], parts[0], dirs_exist_ok=True)
    assert_equal(live, run(student_dir, lone, short, tmp_path / "run", parts[0], mode="read", train={"epochs": 1}))
    fill(student_dir, lone, short, tmp_path / "none", parts[0])
    assert "there is nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_base_of_a_lora_student_is_cached_too(student_dir, short, tmp_path, processes, capfd):
    options = {"lora": LoRAArgs(r=4, dropout=0.1), "devices": processes, "optimizer": RATE}
    options["eval"] = {"initial_validation": False}
    caching = TeacherArgs(use_base=True, cache_dir=str(tmp_path / "cache"))
    teachers = {"live": TeacherArgs(use_base=True), "filling": caching, "cached": caching}
    for name, teacher in teachers.items():
        changes = {"teacher": teacher, "train": TRAIN | {"epochs": 1}, **options}
        in_processes(processes, partial(distil, **changes), student_dir, None, short, tmp_path / name)
    live, *others = (torch.load(tmp_path / name / "final" / "lit_model.pth") for name in teachers)
    for weights in others:
        assert_equal(live, weights)
    assert "all there" in capfd.readouterr().out


LARGE = replace(materials.TEACHER_CONFIG, n_layer=6, n_embd=768, head_size=64, n_head=12, intermediate_size=2048)


def write_few(directory: Path, **numbers: int) -> None:
    """Keeps that many records of a split."""
    for path, number in zip((directory / "train.json", directory / "val.json"), numbers.values(), strict=True):
        path.write_text(json.dumps(json.loads(path.read_text())[:number]))


def measure(growth: Path, *arguments, **options) -> None:
    # what the models take is then not taken from what others have left
    return_freed_memory()
    with watched() as result:
        run(*arguments, **options)
    growth.write_text(str(result["growth"]))


def test_a_cached_teacher_is_not_in_memory(student_dir, short, tmp_path):
    write_few(short.json_path, training=6, validation=1)
    source, cache = tmp_path / "large", tmp_path / "cache"
    materials.write_checkpoint(source, LARGE, GPT(LARGE).state_dict(), tied=False)
    body = (source / "lit_model.pth").stat().st_size - 2 * 4 * LARGE.padded_vocab_size * LARGE.n_embd
    found = {}
    for name in ("live", "filling", "cached"):
        directory = None if name == "live" else cache
        arguments = tmp_path / name, student_dir, source, short, tmp_path / "run" / name, directory
        in_fresh_processes(1, partial(measure, train={"epochs": None, "max_steps": 1}), *arguments)
        found[name] = int(arguments[0].read_text())
        if name == "filling":
            (source / "lit_model.pth").unlink()
    assert found["live"] - found["cached"] > 0.9 * body


@pytest.fixture(scope="module")
def live(student_dir, teacher_dir, alice_json, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The student of one process with a live teacher."""
    directory = tmp_path_factory.mktemp("live")
    return run(student_dir, teacher_dir, short_data(alice_json, directory / "short"), directory / "run")


@pytest.mark.parametrize(("writers", "readers"), with_all_slow_but(((2, 1),), ((1, 2), (2, 1), (3, 2))))
def test_any_number_of_processes_reads_what_another_has_written(
    student_dir, teacher_dir, lone, short, live, tmp_path, writers, readers
):
    cache, out_dirs = tmp_path / "cache", [tmp_path / name for name in ("written", "read")]
    for processes, teacher, out_dir in ((writers, teacher_dir, out_dirs[0]), (readers, lone, out_dirs[1])):
        in_processes(processes, partial(run, devices=processes), student_dir, teacher, short, out_dir, cache)
        found = torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)
        assert_equal(live, found, within=1e-6)


def test_streamed_records_in_micro_batches_of_tokens(student_dir, teacher_dir, lone, short, tmp_path):
    train, val = (short.json_path / f"{name}.json" for name in ("train", "val"))
    data = StreamingSFT(str(train), mask_prompt=True, val_path=str(val), prompt_style=Default(), micro_batch_tokens=300)
    data.num_workers, data.cache_dir = 2, tmp_path / "prepared"
    live, filling, cached = (
        run(student_dir, teacher, data, tmp_path / name, cache, train={"epochs": 1})
        for name, teacher, cache in (
            ("live", teacher_dir, None),
            ("filling", teacher_dir, tmp_path / "cache"),
            ("cached", lone, tmp_path / "cache"),
        )
    )
    assert_equal(live, filling)
    assert_equal(live, cached)


def test_a_remote_cache_is_only_read(student_dir, teacher_dir, lone, short, tmp_path):
    live = run(student_dir, teacher_dir, short, tmp_path / "live", train={"epochs": 1})
    fill(student_dir, teacher_dir, short, tmp_path / "none", tmp_path / "cache")
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path / "cache"), "/bucket/", recursive=True)
    options = {"mode": "read", "train": {"epochs": 1}}
    assert_equal(live, run(student_dir, lone, short, tmp_path / "run", "memory://bucket/cache", **options))
    remote.rm(remote.ls("/bucket/cache/training", detail=False)[0])
    with pytest.raises(UserError, match="lacks 40 training samples"):
        run(student_dir, lone, short, tmp_path / "lacking", "memory://bucket/cache", **options)
    with pytest.raises(UserError, match="memory://bucket/cache is remote, and is only read"):
        run(student_dir, lone, short, tmp_path / "lacking", "memory://bucket/cache")


FORWARD_KL = {"bf16": 1e-4, "fp8": 1e-2}
"""At most, in nats per token."""


@pytest.mark.parametrize("dtype", FORWARD_KL)
def test_narrow_hidden_states_cost_what_is_said(student_dir, teacher_dir, lone, short, tmp_path, capsys, dtype):
    cache, options = tmp_path / "cache", {"dtype": dtype, "train": {"epochs": 1}}
    fill(student_dir, teacher_dir, short, tmp_path / "none", cache, **options)
    said = re.search(r"forward KL of the teacher to it (\d\.\d+) nats per token", capsys.readouterr().out)
    assert 0 <= float(said[1]) < FORWARD_KL[dtype]
    run(student_dir, teacher_dir, short, tmp_path / "live", train={"epochs": 1})
    run(student_dir, lone, short, tmp_path / "found", cache, mode="read", **options)
    losses = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("live", "found")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0] != losses[1]
    bytes_of_token, said = {"bf16": 256, "fp8": 132}[dtype], capsys.readouterr().out
    assert f"{bytes_of_token} bytes a response token" in said
    # with the LM head, of half a megabyte
    told, taken = (
        re.search(rf"{cache}: (\d+\.\d) ([KM])B", said),
        sum(path.stat().st_size for path in cache.rglob("*.*")),
    )
    assert float(told[1]) * {"K": 1e3, "M": 1e6}[told[2]] == pytest.approx(taken, rel=0.15)
    assert sum(path.stat().st_size for path in chunks(cache)) == pytest.approx(2505 * bytes_of_token, rel=0.02)
