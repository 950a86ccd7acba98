"""The loop against plain autograd on whole batches, and what its options do."""

import math
import time

import numpy as np
import pytest
import torch
from helpers.runs import alice, distil, gpt, metrics, train_args
from litgpt.args import TrainArgs
from litgpt.tokenizer import Tokenizer

import litgpt_akl.training.loop
from litgpt_akl.data.steps import StepSampler
from litgpt_akl.loss.divergences import adaptive_kl
from litgpt_akl.messages import UserError
from litgpt_akl.training.optimizer import make_scheduler
from litgpt_akl.training.run import total_steps, warmup_steps

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}


def samples_of_first_step(data, tokenizer_dir, seed=1337, batch=8):
    """The samples that make the first step, as LitGPT's own dataset gives them."""
    data.connect(tokenizer=Tokenizer(tokenizer_dir), batch_size=1)
    data.setup()
    lengths = np.array([len(sample["input_ids"]) for sample in data.train_dataset])
    plan = StepSampler(len(lengths), batch, seed, lengths.__getitem__)
    return [data.train_dataset[int(number)] for number in plan.step(0, 0)]


def test_one_step_is_that_of_the_dense_formula(teacher_dir, untied_student_dir, alice_json, tmp_path):
    student, teacher = gpt(untied_student_dir), gpt(teacher_dir)
    total, tokens = 0.0, 0
    for sample in samples_of_first_step(alice(alice_json), untied_student_dir):
        ids, labels = sample["input_ids"][None], sample["labels"][1:]
        kept = labels != -100
        student_logits = student(ids)[0, :-1][kept]
        with torch.no_grad():
            teacher_logits = teacher(ids)[0, :-1][kept]
        cross_entropy = torch.nn.functional.cross_entropy(student_logits, labels[kept], reduction="sum")
        total = total + 0.3 * cross_entropy + 0.7 * adaptive_kl(teacher_logits, student_logits).sum()
        tokens += int(kept.sum())
    (total / tokens).backward()
    final = distil(
        untied_student_dir,
        teacher_dir,
        alice_json,
        tmp_path / "out",
        train={"max_steps": 1, "max_norm": None},
        distill={"kd_ratio": 0.7},
        optimizer=SGD,
    )
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(final[name], parameter.detach() - 0.5 * parameter.grad, rtol=0, atol=1e-6)
    row = next(row for row in metrics(tmp_path / "out") if "loss" in row)
    assert row["loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    squares = sum(float(parameter.grad.square().sum()) for parameter in student.parameters())
    assert row["gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)


def test_steps_do_not_depend_on_the_micro_batch_size(teacher_dir, student_dir, alice_json, tmp_path):
    finals = [
        distil(
            student_dir,
            teacher_dir,
            alice_json,
            tmp_path / str(size),
            train={"micro_batch_size": size, "max_steps": 5, "max_norm": 0.5},
            distill={"block_tokens": block},
            optimizer=SGD,
        )
        for size, block in ((8, None), (3, 50), (1, 7))
    ]
    for other in finals[1:]:
        for name, weight in finals[0].items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_clipping_and_tied_heads(teacher_dir, student_dir, untied_student_dir, alice_json, tmp_path, tied):
    source = student_dir if tied else untied_student_dir
    final = distil(source, teacher_dir, alice_json, tmp_path, train={"max_steps": 1, "max_norm": 1e-3}, optimizer=SGD)
    start = torch.load(source / "lit_model.pth", weights_only=True)
    assert torch.equal(final["lm_head.weight"], final["transformer.wte.weight"]) == tied
    names = [name for name in start if not (tied and name == "lm_head.weight")]
    moved = sum(float((final[name] - start[name]).square().sum()) for name in names)
    assert math.sqrt(moved) == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_the_loss_falls_and_validation_tells(teacher_dir, student_dir, alice_json, tmp_path):
    distil(
        student_dir,
        teacher_dir,
        alice_json,
        tmp_path,
        train={"max_steps": 40, "log_interval": 10},
        eval={"interval": 20, "max_new_tokens": 5},
    )
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30, 40]
    validations = [row for row in rows if "val_loss" in row]
    assert len(validations) == 3
    first, last = validations[0], validations[-1]
    assert first["val_cross_entropy"] == pytest.approx(math.log(1024), abs=0.1) and first["val_gap_closed"] == 0
    assert last["val_divergence"] < 0.8 * first["val_divergence"]
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_cross_entropy"]))
    gap = first["val_cross_entropy"] - first["val_teacher_cross_entropy"]
    closed = first["val_cross_entropy"] - last["val_cross_entropy"]
    assert last["val_gap_closed"] == pytest.approx(closed / gap, rel=1e-4) and closed > 0
    assert {row["val_teacher_cross_entropy"] for row in validations} == {first["val_teacher_cross_entropy"]}


def test_a_student_that_is_its_teacher_stays_where_it_is(teacher_dir, alice_json, tmp_path):
    final = distil(teacher_dir, teacher_dir, alice_json, tmp_path, distill={"kd_ratio": 1.0}, optimizer=SGD)
    start = torch.load(teacher_dir / "lit_model.pth", weights_only=True)
    assert all(torch.equal(final[name], weight) for name, weight in start.items())
    row = [row for row in metrics(tmp_path) if "val_loss" in row][-1]
    assert (row["val_forward_kl"], row["val_reverse_kl"], row["val_loss"], row["val_agreement"]) == (0, 0, 0, 1)


def test_a_loss_that_is_not_finite_stops_the_run(teacher_dir, student_dir, alice_json, tmp_path):
    with pytest.raises(UserError, match=r"Step \d: the loss is \S+, the gradient norm nan; the step was not taken"):
        distil(
            student_dir,
            teacher_dir,
            alice_json,
            tmp_path,
            train={"max_steps": 10, "save_interval": 2, "max_norm": None, "lr_warmup_steps": 0},
            eval={"initial_validation": False},
            optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e20}},
        )
    assert not (tmp_path / "final").exists()


def test_the_last_good_checkpoint_survives_a_broken_loss(teacher_dir, student_dir, alice_json, tmp_path):
    options = {"train": {"max_steps": 4, "save_interval": 2}}
    distil(student_dir, teacher_dir, alice_json, tmp_path, **options)
    kept = torch.load(tmp_path / "step-000002" / "lit_model.pth", weights_only=True)
    assert all(weight.isfinite().all() for weight in kept.values())


def test_max_time_ends_a_run_with_a_student(teacher_dir, student_dir, alice_json, tmp_path):
    distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 10_000, "max_time": 1.0})
    steps = [row["step"] for row in metrics(tmp_path) if "loss" in row]
    assert 1 <= steps[-1] < 10_000


def test_validating_and_saving_are_no_part_of_a_step(teacher_dir, student_dir, alice_json, tmp_path, monkeypatch):
    """Half a second of waiting at each, between steps of some hundredths."""
    report, save = litgpt_akl.training.loop.report, litgpt_akl.training.loop.save_training_state
    monkeypatch.setattr(litgpt_akl.training.loop, "report", lambda *a, **k: (time.sleep(0.5), report(*a, **k)))
    monkeypatch.setattr(
        litgpt_akl.training.loop, "save_training_state", lambda *a, **k: (time.sleep(0.5), save(*a, **k))
    )
    train = {"max_steps": 4, "save_interval": 1, "log_interval": 2}
    distil(student_dir, teacher_dir, alice_json, tmp_path, train=train, eval={"interval": 1})
    steps = [row["seconds_per_step"] for row in metrics(tmp_path) if "seconds_per_step" in row]
    # with both it would be a second and more: two of each lie between the two rows
    assert len(steps) == 2 and steps[1] < 0.8


def rates(train: TrainArgs, samples: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    steps = total_steps(train, samples)
    scheduler = make_scheduler(optimizer, warmup_steps(train, samples), steps, train.min_lr)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*found, scheduler.get_last_lr()[0]]


def test_the_learning_rate():
    # 4 steps up, the top at the fifth, then half a cosine down to the floor
    found = rates(train_args(max_steps=12, lr_warmup_steps=4, min_lr=0.1), samples=1000)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[8] == pytest.approx(0.1 + 0.9 / 2) and found[12] == pytest.approx(0.1)
    assert rates(train_args(max_steps=4, lr_warmup_steps=0), 1000) == pytest.approx(
        [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4), 0.0]
    )
    # a warm-up as long as the run, or longer, only rises
    for warmup in (4, 9):
        assert rates(train_args(max_steps=4, lr_warmup_steps=warmup), 1000)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_the_length_of_a_run_and_of_its_warm_up():
    assert total_steps(train_args(epochs=2, max_steps=None, global_batch_size=16), 100) == 14
    assert total_steps(train_args(epochs=2, max_steps=5, global_batch_size=16), 100) == 5
    by_fraction = train_args(
        epochs=2, max_steps=None, global_batch_size=10, lr_warmup_steps=None, lr_warmup_fraction=0.25
    )
    assert warmup_steps(by_fraction, 100) == 3
    assert warmup_steps(train_args(max_steps=50), 100) == 5
    assert warmup_steps(train_args(max_steps=5000), 100) == 100
    assert warmup_steps(train_args(max_steps=50, lr_warmup_steps=0), 100) == 0


def test_runs_of_two_temperatures_tell_the_same_of_the_same_student(teacher_dir, student_dir, alice_json, tmp_path):
    """What is compared between runs must not depend on what they minimise."""
    told = []
    for temperature in (1.0, 3.0):
        out, train = tmp_path / str(temperature), {"max_steps": 1}
        distil(student_dir, teacher_dir, alice_json, out, train=train, distill={"temperature": temperature})
        told.append(next(row for row in metrics(out) if "val_loss" in row))
    one, three = told
    names = {"forward_kl", "reverse_kl", "agreement", "cross_entropy", "teacher_cross_entropy"}
    for name in names:
        assert one[f"val_{name}"] == pytest.approx(three[f"val_{name}"], rel=1e-6)
    assert abs(one["val_divergence"] - three["val_divergence"]) > 0.05
