"""Signals and faults of the real command: what it leaves, what it says, and with which status it ends."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import Command, start
from helpers.runs import distil, metrics
from litgpt.model import GPT

from litgpt_akl.files.manifest import damage
from litgpt_akl.messages import UserError


@pytest.fixture
def command(teacher_dir, student_dir, alice_json, tmp_path) -> list[str]:
    return [
        *("finetune_akl", str(student_dir)),
        *("--teacher_checkpoint_dir", str(teacher_dir), "--data", "JSON", "--data.json_path", str(alice_json)),
        *("--data.mask_prompt", "true", "--data.prompt_style.class_path", "litgpt.prompts.Default"),
        *("--data.num_workers", "1", "--distill.compile", "false", "--train.max_steps", "100000"),
        *("--train.save_interval", "null", "--eval.interval", "100000", "--out_dir", str(tmp_path / "run")),
    ]


def wait_for_steps(process: Command, out_dir: Path) -> None:
    deadline = time.monotonic() + 90
    while not any(path.stat().st_size > 2000 for path in out_dir.glob("logs/csv/version_*/metrics.csv")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.page
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(command, tmp_path, number):
    process = start(command, tmp_path / "output", tmp_path / "errors")
    wait_for_steps(process, tmp_path / "run")
    # as a terminal or a scheduler does it, the whole group is told
    os.killpg(process.pid, number)
    process.wait(60)
    output, errors = (tmp_path / "output").read_text(), (tmp_path / "errors").read_text()
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert f"{number.name}: finishing this step and saving" in errors and "--resume auto goes on" in output
    saved = list((tmp_path / "run").glob("step-*"))
    assert len(saved) == 1 and damage(saved[0]) is None and not (tmp_path / "run" / "final").exists()
    step = json.loads((saved[0] / "manifest.json").read_text())["step"]
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == list(range(1, step + 1))
    page, on = (tmp_path / "run" / "report.html").read_text(), f"--resume auto goes on from {saved[0].name}."
    assert f"Stopped at step {step:,} of 65: {number.name}. The same command with {on}" in page
    assert "goesOn: false" in page


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(command, tmp_path):
    out_dir = tmp_path / "run"
    at_most = ["--train.max_steps", "2", "--train.save_interval", "1"]
    assert start([*command, *at_most], tmp_path / "log").wait(120) == 0, (tmp_path / "log").read_text()
    before = sorted(path.name for path in out_dir.glob("step-*"))
    more = [*command, "--train.save_interval", "1", "--resume", "auto", "--accept_changes", "true"]
    process = start(more, tmp_path / "output", tmp_path / "errors")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    assert process.wait(120) == 1 and "Traceback" not in (errors := (tmp_path / "errors").read_text())
    assert "step-000003 cannot be written (File too large)" in errors
    assert sorted(path.name for path in out_dir.iterdir() if "step" in path.name) == before
    assert all(damage(out_dir / name) is None for name in before)


def test_max_time_saves_and_a_second_run_goes_on(teacher_dir, student_dir, alice_json, tmp_path):
    distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 8, "max_time": 1e-6})
    assert damage(tmp_path / "step-000001") is None
    rest = distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 8}, resume="auto")
    whole = distil(student_dir, teacher_dir, alice_json, tmp_path / "whole", train={"max_steps": 8})
    assert all(torch.equal(rest[name], weight) for name, weight in whole.items())


BROKEN = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e20}}


@pytest.mark.page
@pytest.mark.parametrize(("choice", "steps"), [("stop", 1), ("skip", 3)])
def test_a_loss_that_is_not_finite_lists_its_samples(
    teacher_dir, student_dir, alice_json, tmp_path, choice, steps, capsys
):
    options = {"train": {"max_steps": 10, "max_norm": None, "lr_warmup_steps": 0}, "optimizer": BROKEN}
    with pytest.raises(UserError, match=r"Step \d: the loss is .*the step was not taken.*listed in"):
        distil(student_dir, teacher_dir, alice_json, tmp_path, on_nonfinite=choice, **options)
    reports = sorted(tmp_path.glob("nonfinite-step-*.json"))
    assert len(reports) == steps and capsys.readouterr().out.count("the step was dropped") == steps - 1
    report = json.loads(reports[0].read_text())
    assert len(report["samples"]) == 8 and report["step"] == 2
    assert "train.json, line " in report["samples"][0]["place"]
    assert not (tmp_path / "final").exists()
    page = (tmp_path / "report.html").read_text()
    assert f"Stopped at step {steps + 1} of 10: Step {steps + 1}: the loss is" in page and "goesOn: false" in page
    assert "No checkpoint was saved: the same command begins anew." in page


def test_a_dropped_step_changes_nothing_but_the_schedule(teacher_dir, student_dir, alice_json, tmp_path, monkeypatch):
    import litgpt_akl.training.loop as loop

    taken = loop.distillation_loss
    calls = []

    def loss(*arguments):
        calls.append(None)
        result = taken(*arguments)
        # two micro-batches a step, the second of the second step is not finite
        return result._replace(loss=result.loss * float("nan")) if len(calls) == 4 else result

    monkeypatch.setattr(loop, "distillation_loss", loss)
    options = {"train": {"max_steps": 3, "save_interval": 1}, "eval": {"initial_validation": False}}
    distil(student_dir, teacher_dir, alice_json, tmp_path, on_nonfinite="skip", **options)
    weights = [torch.load(tmp_path / f"step-00000{n}" / "lit_model.pth", weights_only=True) for n in (1, 2, 3)]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert not torch.equal(weights[1]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_a_signal_before_the_first_step_says_that_nothing_was_saved(
    teacher_dir, student_dir, alice_json, tmp_path, capfd
):
    sent = []

    def send(module: torch.nn.Module, *_: object) -> None:
        if isinstance(module, GPT) and not sent and next(module.parameters()).device.type != "meta":
            sent.append(module)
            os.kill(os.getpid(), signal.SIGTERM)

    hook = torch.nn.modules.module.register_module_forward_hook(send)
    try:
        with pytest.raises(SystemExit):
            distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 1})
    finally:
        hook.remove()
    told, errors = capfd.readouterr()
    assert "SIGTERM: ending before the first step; a second signal" in errors and "saving" not in errors
    assert "No step was finished, and nothing was saved" in told and "--resume auto" not in told
    assert list(tmp_path.glob("step-*")) == []
    distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 1}, resume="auto")
    assert "there is no checkpoint in" in capfd.readouterr().out
    distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 1}, resume="auto", overwrite=False)
    assert "there is no checkpoint in" not in capfd.readouterr().out
