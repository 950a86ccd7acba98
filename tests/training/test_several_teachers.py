"""Several teachers whose distributions are averaged: live and cached, in one process and in two, interrupted or not."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import materials
import pytest
import torch
from helpers.cache_runs import RATE, assert_equal
from helpers.formulas import formula
from helpers.ranks import in_processes
from helpers.runs import assert_same, difference, distil, final, gpt, metrics
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.config.teachers import ListedTeacher
from litgpt_akl.loss.divergences import adaptive_kl_weight
from litgpt_akl.messages import UserError

TRAIN = {"global_batch_size": 6, "micro_batch_size": 2, "max_steps": 2}
SHARES = (0.75, 0.25)


@pytest.fixture(scope="module")
def second_dir(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher: narrower, with a softcap, and with ids that only pad."""
    changes = {"name": "second", "padded_vocab_size": 1088, "final_logit_softcapping": 4.0, "n_layer": 3}
    config, directory = replace(materials.STUDENT_CONFIG, **changes), tmp_path_factory.mktemp("second") / "second"
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = GPT(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    materials.write_checkpoint(directory, config, model.state_dict(), tied=False)
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(described | {"final_logit_softcapping": 4.0}))
    return directory


@pytest.fixture(scope="module")
def pair(teacher_dir: Path, second_dir: Path) -> list[ListedTeacher]:
    """Weights count relative to each other."""
    return [ListedTeacher(teacher_dir, weight=3.0), ListedTeacher(second_dir)]


def cached(pair: list[ListedTeacher], cache: Path) -> list[ListedTeacher]:
    return [replace(of, cache_dir=str(cache / str(number))) for number, of in enumerate(pair)]


def run(student: Path, teachers: list[ListedTeacher], data, out_dir: Path, **changes) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    train = TRAIN | changes.pop("train", {})
    options = {"optimizer": RATE, "eval": {"initial_validation": False}, **changes}
    return distil(student, None, data, out_dir, train=train, teachers=teachers, **options)


def test_a_step_is_that_of_the_dense_formula(student_dir, pair, short, tmp_path):
    """Loss, gradient and validation by whole models in float64, the softmax averaged, under autograd."""
    objective = {"temperature": 2.0, "kd_ratio": 0.7}
    rate = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}
    once = {"global_batch_size": 40, "max_steps": 1, "max_norm": None}
    trained = run(student_dir, pair, short, tmp_path / "run", train=once, distill=objective, optimizer=rate)
    loss = DistillArgs(compile=False, **objective).loss()
    student, teachers = gpt(student_dir).double(), [gpt(of.directory).double() for of in pair]
    student.lm_head.weight = student.transformer.wte.weight
    short.connect(Tokenizer(student_dir), 1, 128)
    short.setup()
    total = count = 0
    for sample in short.train_dataset:
        kept = sample["labels"][1:] != -100
        ids, labels = sample["input_ids"][None].long(), sample["labels"][1:][kept].long()
        logits = student(ids)[0, :-1][kept]
        with torch.no_grad():
            parts = [teacher(ids)[0, :-1][kept][:, :1024] for teacher in teachers]
        mixed = sum(w * torch.softmax(z / loss.temperature, -1) for w, z in zip(SHARES, parts, strict=True)).log()
        mixed = mixed * loss.temperature
        h = adaptive_kl_weight(mixed, logits.detach(), mu=loss.mu, temperature=loss.temperature)
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        value = formula(loss, mixed, logits, h)
        total = total + (0.3 * cross_entropy + 0.7 * value).sum()
        count += len(labels)
    (total / count).backward()
    logged = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert logged[0]["loss"] == pytest.approx(total.item() / count, rel=1e-6)
    for name, parameter in gpt(student_dir).named_parameters():
        gradient = dict(student.named_parameters()).get(name, student.transformer.wte.weight).grad
        torch.testing.assert_close(trained[name], (parameter - gradient).float(), rtol=1e-6, atol=1e-6)


def test_live_and_cached_are_the_same_bit_for_bit(student_dir, pair, short, tmp_path, capsys):
    live = run(student_dir, pair, short, tmp_path / "live")
    held = cached(pair, tmp_path / "cache")
    # the first teacher alone is cached: one does not wait for the other
    half = run(student_dir, [held[0], pair[1]], short, tmp_path / "half")
    filling = run(student_dir, held, short, tmp_path / "filling")
    lone = []
    for of in held:
        directory = shutil.copytree(of.directory, tmp_path / "lone" / of.directory.name)
        (directory / "lit_model.pth").unlink()
        lone.append(replace(of, directory=directory))
    capsys.readouterr()
    options = {"teacher": TeacherArgs(cache_mode="read")}
    read = run(student_dir, lone, short, tmp_path / "read", **options)
    for weights in (half, filling, read):
        assert_equal(live, weights)
    assert metrics(tmp_path / "live")[-1]["val_loss"] == metrics(tmp_path / "read")[-1]["val_loss"]
    told = " ".join(capsys.readouterr().out.split())
    assert "taught by the average of 2 teachers: 0.75 of lone/glassllm-en (4 layers" in told
    assert "0.25 of lone/second (3 layers" in told
    assert told.count("cached: its LM head alone is loaded") == 2
    assert told.count("all there: the teacher's body is not needed") == 2


@pytest.mark.slow
def test_caches_are_filled_by_one_teacher_after_the_other(student_dir, pair, short, tmp_path, capsys):
    held = cached(pair, tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="final"):
        run(student_dir, held, short, tmp_path / "none", teacher=TeacherArgs(cache_mode="fill"))
    assert [f"cache/{number} has all samples" in capsys.readouterr().out for number in (0,)] == [True]
    options = {"teacher": TeacherArgs(cache_mode="read")}
    found = run(student_dir, held, short, tmp_path / "read", **options)
    assert_equal(found, run(student_dir, pair, short, tmp_path / "live"), within=1e-5)


@pytest.mark.parametrize("is_cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_take_the_steps_of_one(student_dir, pair, short, tmp_path, is_cached):
    expected = run(student_dir, pair, short, tmp_path / "one")
    teachers = cached(pair, tmp_path / "cache") if is_cached else pair
    work = partial(run, student_dir, teachers, short, devices=2)
    for name in ("first", "second")[: 1 + is_cached]:
        in_processes(2, partial(work, tmp_path / name))
        assert difference(expected, final(tmp_path / name)) < 1e-6
    rows = [metrics(tmp_path / name)[-1] for name in ("one", "first")]
    for column in ("val_forward_kl", "val_forward_kl_1", "val_forward_kl_2"):
        assert rows[1][column] == pytest.approx(rows[0][column], rel=1e-5)


def test_an_interrupted_run_goes_on_bit_for_bit(student_dir, pair, short, tmp_path):
    options = {"train": {"save_interval": 1}, "eval": {"interval": 2}}
    work = partial(run, student_dir, pair, short, **options)
    work(tmp_path / "whole")
    # caches, and where teachers lie, may change; what each counts may not
    resume = tmp_path / "whole" / "step-000001"
    run(student_dir, cached(pair, tmp_path / "cache"), short, tmp_path / "resumed", resume=resume, **options)
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    other = [replace(pair[0], weight=2.0), pair[1]]
    with pytest.raises(UserError, match="teachers .*'weight': 3.0.* -> .*'weight': 2.0"):
        run(student_dir, other, short, tmp_path / "other", resume=resume, **options)
    with pytest.raises(UserError, match="the teacher has other weights; the teacher 2 has other weights"):
        swapped = [replace(pair[0], directory=pair[1].directory), replace(pair[1], directory=pair[0].directory)]
        run(student_dir, swapped, short, tmp_path / "other", resume=resume, **options)


@pytest.mark.slow
def test_one_listed_teacher_is_the_ordinary_run(student_dir, teacher_dir, short, tmp_path):
    options = {"train": TRAIN | {"max_steps": 2}, "optimizer": RATE, "eval": {"initial_validation": False}}
    distil(student_dir, teacher_dir, short, tmp_path / "plain", **options)
    distil(student_dir, None, short, tmp_path / "one", teachers=[ListedTeacher(teacher_dir)], **options)
    assert_same(tmp_path / "plain", tmp_path / "one")


@pytest.mark.slow
def test_the_end_tells_the_distance_to_each_teacher(student_dir, teacher_dir, pair, short, tmp_path, capsys):
    """By itself each is as far as a run with it alone says of the same student."""
    once = {"train": TRAIN | {"max_steps": 1}, "optimizer": RATE, "eval": {}}
    run(student_dir, pair, short, tmp_path / "both", train=once["train"], eval={"max_new_tokens": 4, "interval": 1})
    told = capsys.readouterr().out
    assert "forward KL to" in told
    before = metrics(tmp_path / "both")[0]
    for number, of in enumerate(pair, start=1):
        distil(student_dir, of.directory, short, tmp_path / str(number), **once)
        alone = metrics(tmp_path / str(number))[0]["val_forward_kl"]
        assert before[f"val_forward_kl_{number}"] == pytest.approx(alone, rel=1e-6)
