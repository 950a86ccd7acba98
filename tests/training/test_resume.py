"""Resuming from a checkpoint: exactly, only with the same recipe, and from the one before a damaged one."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.runs import assert_same, distil, final, rows
from litgpt.prompts import Default

from litgpt_akl.data import StreamingSFT
from litgpt_akl.messages import UserError

OPTIONS = {"epochs": 2, "max_steps": None, "global_batch_size": 40, "save_interval": 3}


def streaming(alice_json: Path, tmp_path: Path, **options) -> StreamingSFT:
    options = {"mask_prompt": True, "prompt_style": Default(), "num_workers": 0, "num_proc": 1, **options}
    paths = {"path": str(alice_json / "train.json"), "val_path": str(alice_json / "val.json")}
    return StreamingSFT(**paths, cache_dir=tmp_path / "cache", **options)


@pytest.fixture(scope="module")
def whole(teacher_dir, student_dir, alice_json, tmp_path_factory):
    """An undisturbed run's directory."""
    out_dir = tmp_path_factory.mktemp("resume") / "whole"
    distil(student_dir, teacher_dir, alice_json, out_dir, train=OPTIONS, eval={"interval": 4})
    return out_dir


@pytest.mark.parametrize("step", ["step-000003", "step-000006", "step-000009/lit_model.pth"])
def test_a_resumed_run_ends_as_an_undisturbed_one(teacher_dir, student_dir, alice_json, tmp_path, whole, step):
    options = {"train": OPTIONS, "eval": {"interval": 4}, "resume": whole / step}
    distil(student_dir, teacher_dir, alice_json, tmp_path / "resumed", **options)
    assert_same(whole, tmp_path / "resumed")
    assert sorted(int(row["step"]) for row in rows(whole) if row["loss"]) == list(range(1, 11))


def test_what_does_not_change_the_result_may_change(teacher_dir, student_dir, alice_json, tmp_path, whole):
    moved = {
        name: shutil.copytree(path, tmp_path / name) for name, path in {"s": student_dir, "t": teacher_dir}.items()
    }
    data = shutil.copytree(alice_json, tmp_path / "elsewhere")
    train = OPTIONS | {"micro_batch_size": 3, "log_interval": 2, "save_interval": 4, "max_time": 1000.0}
    distil(
        moved["s"],
        moved["t"],
        data,
        tmp_path / "resumed",
        train=train,
        eval={"interval": 5, "max_iters": 2},
        distill={"block_tokens": 17},
        resume=whole / "step-000006",
        keep_last=1,
    )
    for name, weight in final(whole).items():
        torch.testing.assert_close(final(tmp_path / "resumed")[name], weight, rtol=0, atol=1e-6)


def test_another_recipe_is_refused_with_its_differences_or_accepted(
    teacher_dir, student_dir, untied_student_dir, alice_json, tmp_path, whole
):
    lr = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    cases = [
        ({"seed": 5}, "seed 1337 -> 5"),
        ({"distill": {"divergence": "fkl"}}, "distill.divergence akl -> fkl"),
        ({"train": OPTIONS | {"global_batch_size": 20}}, "train.global_batch_size 40 -> 20"),
        ({"train": OPTIONS | {"epochs": 3, "max_norm": 0.5}}, "train.epochs 2 -> 3; train.max_norm 1.0 -> 0.5"),
        ({"optimizer": lr}, "optimizer.init_args.lr 0.003 -> 0.001"),
        ({"optimizer": "AdamW"}, "optimizer.class_path torch.optim.AdamW -> None"),
        ({"teacher": untied_student_dir}, "the teacher has other weights"),
        ({"student": untied_student_dir}, "the student has other weights"),
        ({"train": OPTIONS | {"max_seq_length": 40}}, r"train.max_seq_length None -> 40; other training samples"),
        ({"data": alice_json / "val.json"}, r"other training samples \(200 -> 38\)"),
    ]
    for changes, message in cases:
        changes = {"student": student_dir, "teacher": teacher_dir, "data": alice_json, "train": OPTIONS, **changes}
        runs = [changes.pop(name) for name in ("student", "teacher", "data")]
        with pytest.raises(UserError, match=f"another result: .*{message}"):
            distil(*runs, tmp_path / "other", resume=whole / "step-000009", **changes)
    # accepted, the change has its effect: a step of another learning rate, and only that
    ends = []
    for rate in (3e-3, 1e-9):
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate}}
        options = {"train": OPTIONS, "optimizer": optimizer, "accept_changes": True, "resume": whole / "step-000009"}
        ends.append(distil(student_dir, teacher_dir, alice_json, tmp_path / str(rate), **options))
    saved = torch.load(whole / "step-000009" / "lit_model.pth", weights_only=True)
    assert all(torch.equal(ends[0][name], weight) for name, weight in final(whole).items())
    for name, weight in saved.items():
        torch.testing.assert_close(ends[1][name], weight, rtol=0, atol=1e-7)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    teacher_dir, student_dir, alice_json, tmp_path, whole, capsys
):
    out_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out_dir / "final")
    with (out_dir / "step-000009" / "lit_model.pth").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    os.truncate(out_dir / "step-000006" / "training_state.pth", 1000)
    distil(student_dir, teacher_dir, alice_json, out_dir, train=OPTIONS, eval={"interval": 4}, resume="auto")
    told = capsys.readouterr().out
    assert "step-000009 is damaged (lit_model.pth has changed (checksum))" in told
    assert "step-000006 is damaged (training_state.pth has 1,000 bytes" in told
    assert_same(whole, out_dir)


def test_a_directory_with_later_steps_is_not_mixed_with_another_run(
    teacher_dir, student_dir, alice_json, tmp_path, whole
):
    out_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out_dir / "final")
    for resume in (False, out_dir / "step-000003", whole / "step-000006"):
        with pytest.raises(UserError, match=r"checkpoints of an earlier run \(step-000009.*\n.*--resume auto"):
            distil(student_dir, teacher_dir, alice_json, out_dir, train=OPTIONS, resume=resume)
    distil(student_dir, teacher_dir, alice_json, out_dir, train=OPTIONS, resume=out_dir / "step-000009")


def test_old_checkpoints_go_and_the_best_stays(teacher_dir, student_dir, alice_json, tmp_path):
    train = OPTIONS | {"save_interval": 1, "max_steps": 8}
    # the learning rate goes up so far that the loss does, too: an early step is the best
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 300.0}}
    train |= {"lr_warmup_steps": 8, "max_norm": 1000.0}
    options = {"train": train, "eval": {"interval": 2}, "optimizer": optimizer, "keep_last": 2}
    distil(student_dir, teacher_dir, alice_json, tmp_path, **options)
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows(tmp_path) if row["val_loss"]}
    best = min((2, 4, 6), key=losses.get)
    kept = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("step-*"))
    assert best < 6 and kept == sorted({best, 7, 8})


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_streaming_data_is_resumed_exactly(teacher_dir, student_dir, alice_json, tmp_path, workers):
    options = {"train": OPTIONS, "eval": {"interval": 4, "max_new_tokens": 4, "evaluate_example": "random"}}
    distil(student_dir, teacher_dir, streaming(alice_json, tmp_path), tmp_path / "whole", **options)
    for step in (3, 9):
        data = streaming(alice_json, tmp_path, num_workers=workers)
        options["resume"] = tmp_path / "whole" / f"step-{step:06d}"
        distil(student_dir, teacher_dir, data, tmp_path / f"from-{step}", **options)
        assert_same(tmp_path / "whole", tmp_path / f"from-{step}")


@pytest.mark.parametrize("harm", [lambda log: shutil.rmtree(log.parents[2]), lambda log: log.write_text("a,b\n1\n")])
def test_metrics_that_are_lost_are_told_of_and_the_run_goes_on(
    teacher_dir, student_dir, alice_json, tmp_path, whole, harm, capsys
):
    out_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out_dir / "final")
    harm(out_dir / "logs" / "csv" / "version_0" / "metrics.csv")
    distil(student_dir, teacher_dir, alice_json, out_dir, train=OPTIONS, eval={"interval": 4}, resume="auto")
    assert capsys.readouterr().out.count("rows of metrics up to step 9, 0 are taken over") == 1
    assert all(torch.equal(final(out_dir)[name], weight) for name, weight in final(whole).items())
    assert rows(out_dir) == [row for row in rows(whole) if int(row["step"]) > 9]
