"""How near a teacher in fewer bits is: found once, kept, and found again when what it depends on has changed."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.cache_runs import RATE, fill, run
from helpers.memory_runs import watched
from helpers.ranks import in_processes
from helpers.runs import distil
from litgpt.config import Config

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.models.gpt import make_head
from litgpt_akl.models.parallel import rank
from litgpt_akl.training import teacher_accuracy as accuracy
from litgpt_akl.training.teacher_accuracy import compare_teachers


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """What was computed, and not read."""
    calls, compute = [], accuracy._compute

    def counting(run, caches, teacher, batches, kind):
        calls.append(kind)
        return compute(run, caches, teacher, batches, kind)

    monkeypatch.setattr(accuracy, "_compute", counting)
    return calls


def said(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "forward KL of" in line]


@pytest.mark.parametrize(("kind", "other"), [("int8", "nf4"), ("nf4", "int8")])
def test_it_is_kept_beside_a_run(student_dir, teacher_dir, short, tmp_path, computed, capsys, kind, other):
    options = {"train": {"max_steps": 2, "save_interval": 1}, "eval": {"max_iters": 1}, "optimizer": RATE}
    out_dir, lines = tmp_path / "run", []
    for quantize in (kind, kind, other, kind):
        step = out_dir / "step-000001"
        changes = {"resume": step, "accept_changes": True} if step.exists() else {}
        for name in ("step-000002", "final"):
            shutil.rmtree(out_dir / name, ignore_errors=True)
        distil(student_dir, teacher_dir, short, out_dir, teacher=TeacherArgs(quantize=quantize), **options, **changes)
        lines.append(said(capsys.readouterr().out))
    assert computed == [kind, other]
    assert lines[0] == lines[1] == lines[3] != lines[2] and {len(each) for each in lines} == {1}
    (out_dir / accuracy.FILE).write_text("{")
    other_data = tmp_path / "other.json"
    other_data.write_text((short.json_path / "val.json").read_text())
    short.json_path, short.val_split_fraction = other_data, 0.5
    distil(student_dir, teacher_dir, short, tmp_path / "again", teacher=TeacherArgs(quantize=kind), **options)
    assert computed == [kind, other, kind]


def test_it_is_kept_in_a_cache_that_is_filled(student_dir, teacher_dir, lone, short, tmp_path, computed, capsys):
    cache, one_step = tmp_path / "cache", {"train": {"max_steps": 1, "epochs": None}}
    for part in ("1/2", "2/2"):
        fill(student_dir, teacher_dir, short, tmp_path / "none", cache, dtype="fp8", part=part)
    assert computed == ["fp8"]
    run(student_dir, lone, short, tmp_path / "run", cache, mode="auto", dtype="fp8", **one_step)
    assert computed == ["fp8"]
    lines = said(capsys.readouterr().out)
    assert len(lines) == 3 and len(set(lines)) == 1 and not (tmp_path / "run" / accuracy.FILE).exists()


def fill_counting(student: Path, teacher: Path, data, base: Path) -> None:
    """Writes how often each process compares."""
    compare, calls = accuracy.compare_teachers, []
    accuracy.compare_teachers = lambda *arguments: calls.append(None) or compare(*arguments)
    fill(student, teacher, data, base / "none", base / "cache", dtype="fp8", devices=2)
    (base / f"compared-{rank()}").write_text(str(len(calls)))


def test_only_one_process_compares(student_dir, teacher_dir, short, tmp_path):
    in_processes(2, partial(fill_counting, student_dir, teacher_dir, short, tmp_path))
    assert [(tmp_path / f"compared-{number}").read_text() for number in range(2)] == ["1", "0"]


@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 5.0)])
def test_heads_are_not_copied(monkeypatch, bias, softcap):
    config = Config(
        n_layer=1, n_head=4, n_embd=256, padded_vocab_size=150_000, lm_head_bias=bias, final_logit_softcapping=softcap
    )
    torch.manual_seed(0)
    heads = [make_head(config).to(torch.bfloat16) for _ in range(2)]
    hidden = [torch.randn(3, 256, dtype=torch.bfloat16) for _ in range(2)]
    vocab_size, size = 149_000, 4 * 256 * 150_000
    logits = []
    for head, states in zip(heads, hidden, strict=True):
        full = states.double() @ head.weight.double().T + (head.bias.double() if bias else 0)
        logits.append((full if softcap is None else softcap * torch.tanh(full / softcap))[:, :vocab_size])
    p, q = (each.log_softmax(-1) for each in logits)
    del full
    monkeypatch.setattr(accuracy, "_HEAD_NUMBERS", 2**20)
    compare_teachers(hidden[0], heads[0], hidden[1], heads[1], 100)
    with watched() as result, torch.no_grad():
        found = compare_teachers(hidden[0], heads[0], hidden[1], heads[1], vocab_size)
    assert result["growth"] < size / 4
    assert found.forward_kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item() and found.tokens == 3
