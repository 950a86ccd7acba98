"""A cache of the teacher's most probable ids: who fills it changes nothing, and nothing else is taken for it."""

import math
import re
import shutil
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from helpers.cache_runs import RATE, TRAIN, assert_equal, chunks, fill, run
from helpers.marks import with_all_slow_but
from helpers.ranks import in_processes
from helpers.reference import kl, log_softmax, lumped
from helpers.runs import assert_same, distil, final, gpt, metrics, short_data
from litgpt.tokenizer import Tokenizer

from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.config.distillation import TADArgs
from litgpt_akl.files.examples import read_examples
from litgpt_akl.messages import UserError

K = {"dtype": "topk:8"}
OPTIONS = {"train": {"epochs": 1, "save_interval": 3}, "eval": {"max_new_tokens": 4}, **K}


@pytest.fixture(scope="module")
def filled(student_dir, teacher_dir, alice_json, tmp_path_factory) -> SimpleNamespace:
    """A run that has filled its cache, the data, and what it has said."""
    place, said = tmp_path_factory.mktemp("top-k"), StringIO()
    data = short_data(alice_json, place / "short")
    with redirect_stdout(said):
        run(student_dir, teacher_dir, data, place / "run", place / "cache", **OPTIONS)
    return SimpleNamespace(data=data, run=place / "run", cache=place / "cache", said=" ".join(said.getvalue().split()))


def test_who_reads_it_trains_as_who_fills_it_without_anything_of_the_teacher(
    student_dir, lone, filled, tmp_path, capsys
):
    cached = tmp_path / "cached"
    run(student_dir, lone, filled.data, cached, filled.cache, mode="read", **OPTIONS)
    said = " ".join(capsys.readouterr().out.split())
    assert_equal(final(filled.run), final(cached))
    assert metrics(filled.run)[-1]["val_loss"] == metrics(cached)[-1]["val_loss"]
    assert not list(filled.cache.glob("head-*"))
    assert "cached: nothing of it is loaded" in said
    for each in (said, filled.said):
        assert "on the teacher's 8 most probable ids and all others as one" in each
        assert "Both KLs take all ids but the teacher's 8 most probable ones" in each
        # 8 ids of 2 bytes, 9 logarithms of 2, and one of 4
        assert "38 bytes a response token" in each
    told = re.search(rf"{filled.cache}: (\d+\.\d) KB", said)
    taken = sum(path.stat().st_size for path in filled.cache.rglob("*.safetensors"))
    assert float(told[1]) * 1e3 == pytest.approx(taken, rel=0.1)
    latest = [read_examples(directory)["latest"] for directory in (filled.run, cached)]
    assert all("the teacher's 8 most probable tokens are cached" in each["note"] for each in latest)
    assert latest[0]["positions"] == latest[1]["positions"]
    assert "38 bytes a response token" in latest[0]["run"]["facts"]["Teacher cache"]


def test_what_it_costs_is_said_once(student_dir, teacher_dir, filled):
    pattern = r"8 ids have (\S+)% of the .* as it is now, (\S+) nats a token, (\S+) are lost \((\d+) response"
    found, data = re.findall(pattern, filled.said), filled.data
    data.connect(Tokenizer(student_dir), batch_size=1, max_seq_length=128)
    data.setup()
    models, sums, tokens = [gpt(directory) for directory in (teacher_dir, student_dir)], [0.0] * 3, 0
    for sample in (data.train_dataset[number] for number in range(8)):
        with torch.no_grad():
            logits = [model(sample["input_ids"][None])[0].double() for model in models]
        for row in (sample["labels"][1:] != -100).nonzero()[:, 0].tolist():
            log_p, log_q = (log_softmax(each[row].tolist()) for each in logits)
            order = sorted(range(len(log_p)), key=lambda id, of=log_p: -of[id])[:8]
            part = lumped(log_p, order), lumped(log_q, order)
            mass, whole = 100 * sum(map(math.exp, part[0][:-1])), kl(log_p, log_q)
            values, tokens = (mass, whole, whole - kl(*part)), tokens + 1
            sums = [total + value for total, value in zip(sums, values, strict=True)]
    assert [float(text) for text in found[0][:3]] == pytest.approx([total / tokens for total in sums], abs=5e-3)
    assert (len(found), int(found[0][3])) == (1, tokens)


def test_a_resumed_run_ends_as_an_undisturbed_one(student_dir, teacher_dir, filled, tmp_path):
    cache = shutil.copytree(filled.cache, tmp_path / "cache")
    for chunk in chunks(cache):
        # what a killed run had not written yet is computed again
        chunk.unlink()
    options = {**OPTIONS, "resume": filled.run / "step-000003"}
    run(student_dir, teacher_dir, filled.data, tmp_path / "resumed", cache, **options)
    assert_same(filled.run, tmp_path / "resumed")


def others(divergence: str) -> dict:
    return OPTIONS if divergence == "akl" else {**OPTIONS, "distill": {"divergence": "tad", "tad": TADArgs(top_k=3)}}


@pytest.mark.parametrize("divergence", with_all_slow_but(("akl",), ("akl", "tad")))
def test_two_processes_end_as_one_does(student_dir, teacher_dir, lone, filled, tmp_path, divergence):
    options, one, cache = others(divergence), filled.run, tmp_path / "cache"
    if divergence == "tad":
        one = tmp_path / "one"
        run(student_dir, teacher_dir, filled.data, one, tmp_path / "alone", **options)
    for name, teacher in {"filling": teacher_dir, "cached": lone}.items():
        if name == "cached" and divergence == "akl":
            break
        in_processes(2, partial(run, devices=2, **options), student_dir, teacher, filled.data, tmp_path / name, cache)
        assert_equal(final(one), final(tmp_path / name), within=1e-6)


def test_a_cache_of_something_else_is_refused(student_dir, teacher_dir, filled, tmp_path):
    hidden, few = tmp_path / "hidden", filled.cache
    fill(teacher_dir, teacher_dir, filled.data, tmp_path / "none", hidden)
    for cache, dtype, named in (
        (few, "topk:9", "stored_as 'topk:8' -> 'topk:9'"),
        (few, None, "stored_as 'topk:8' -> 'F32'; vocab_size"),
        (hidden, "topk:8", "stored_as 'F32' -> 'topk:8'; vocab_size None ->"),
    ):
        with pytest.raises(UserError, match=f"filled for something else: {named}"):
            run(student_dir, teacher_dir, filled.data, tmp_path / "run", cache, dtype=dtype)
    # files that were copied into another cache's folder are found out, too
    before = {path.name for path in chunks(hidden)}
    shutil.copytree(few / "training", hidden / "training", dirs_exist_ok=True)
    fill(teacher_dir, teacher_dir, filled.data, tmp_path / "none", hidden)
    assert {path.name for path in chunks(hidden)} == before


def test_too_many_ids_are_refused_before_anything_is_written(student_dir, teacher_dir, short, tmp_path):
    with pytest.raises(UserError, match=r"topk:70000: teacher and student share .* ids.*\nGive topk:64"):
        run(student_dir, teacher_dir, short, tmp_path / "run", tmp_path / "cache", dtype="topk:70000")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("is_filled", with_all_slow_but((True,), (True, False)))
def test_on_policy_samples_have_all_of_the_teacher(student_dir, teacher_dir, filled, tmp_path, is_filled):
    cache = shutil.copytree(filled.cache, tmp_path / "filled") if is_filled else tmp_path / "empty"
    distill = {"on_policy": 0.5, "on_policy_tokens": 8}
    run(student_dir, teacher_dir, filled.data, tmp_path / "run", cache, **K, distill=distill, train={"epochs": 1})
    assert all(row["loss"] > 0 for row in metrics(tmp_path / "run") if "loss" in row)


@pytest.mark.slow
def test_what_is_damaged_is_computed_again(student_dir, teacher_dir, filled, tmp_path, capsys):
    cache = shutil.copytree(filled.cache, tmp_path / "cache")
    chunk = chunks(cache)[0]
    data = bytearray(chunk.read_bytes())
    data[-3] ^= 1
    chunk.write_bytes(data)
    run(student_dir, teacher_dir, filled.data, tmp_path / "run", cache, **OPTIONS)
    assert "what is lost is computed again" in capsys.readouterr().err
    assert_equal(final(filled.run), final(tmp_path / "run"))


@pytest.mark.slow
def test_the_base_of_a_lora_student(student_dir, short, tmp_path):
    teacher = TeacherArgs(use_base=True, cache_dir=str(tmp_path / "cache"), cache_dtype="topk:8")
    options = {"lora": LoRAArgs(r=4, dropout=0.1), "teacher": teacher, "train": TRAIN | {"epochs": 1}}
    options |= {"optimizer": RATE, "eval": {"initial_validation": False}}
    filling, cached = (distil(student_dir, None, short, tmp_path / name, **options) for name in ("filling", "cached"))
    assert_equal(filling, cached)


@pytest.mark.slow
def test_a_page_shows_what_is_known(student_dir, teacher_dir, filled, tmp_path):
    options = {"train": OPTIONS["train"], "eval": OPTIONS["eval"]}
    run(student_dir, teacher_dir, filled.data, tmp_path / "exact", **options)
    found, exact = (read_examples(directory)["first"] for directory in (filled.run, tmp_path / "exact"))
    assert "most probable tokens are cached" not in exact["note"]
    for one, whole in zip(found["positions"], exact["positions"], strict=True):
        # rounded, two of them may be equal
        assert {*one["tokens"][:8]} == {*whole["tokens"][:8]}
        assert one["p"][:8] == pytest.approx(whole["p"][:8], abs=2e-3)
        assert one["next_p"] == pytest.approx(whole["next_p"], abs=2e-3)
        assert sum(one["p"]) + one["p_others"] == pytest.approx(1, abs=1e-5)
