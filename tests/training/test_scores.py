"""Scores that are kept in a file: another budget starts from them, and what does not fit is refused."""

import json
import shutil

import pytest
import torch
from helpers.runs import alice

from litgpt_akl.commands.make_student import make_student
from litgpt_akl.messages import UserError
from litgpt_akl.training.scores import Scores


def test_another_budget_starts_from_the_scores(teacher_dir, alice_json, tmp_path, capsys):
    scores, options = tmp_path / "scores.safetensors", {"data": alice(alice_json), "records": 10, "kl_records": 3}
    make_student(teacher_dir, tmp_path / "3", layers=3, scores=scores, **options)
    first = capsys.readouterr().out
    # layers are removed without scores
    assert "Scoring" not in first and "Removing 1 layers one at a time" in first
    make_student(teacher_dir, tmp_path / "2", layers=2, mlp=0.5, scores=scores, **options)
    second = capsys.readouterr().out
    assert "Scoring the teacher's parts" in second and f"is read from {scores}" in second
    assert "Removing 1 more layers" in second
    make_student(teacher_dir, tmp_path / "2 again", layers=2, mlp=0.5, scores=scores, **options)
    assert "Scoring" not in (again := capsys.readouterr().out) and "Removing" not in again
    whole = scores.read_bytes()
    make_student(teacher_dir, tmp_path / "3 again", layers=3, scores=scores, **options)
    third = capsys.readouterr().out
    assert "Scoring" not in third and "Removing" not in third and scores.read_bytes() == whole
    for name, sizes in {"3": {"layers": 3}, "2": {"layers": 2, "mlp": 0.5}}.items():
        make_student(teacher_dir, tmp_path / f"{name} alone", **sizes, **options)
        for file in ("lit_model.pth", "make_student.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name} alone" / file).read_bytes()
    assert (
        json.loads((tmp_path / "3 again" / "make_student.json").read_text())["removed"]
        == json.loads((tmp_path / "3" / "make_student.json").read_text())["removed"]
    )
    # removals of other records or without the ends are others
    make_student(teacher_dir, tmp_path / "ends", layers=3, scores=scores, keep_ends=False, **options)
    assert "Removing 1 layers" in capsys.readouterr().out
    make_student(teacher_dir, tmp_path / "4", layers=3, scores=scores, **{**options, "kl_records": 4})
    assert "Removing 1 layers" in capsys.readouterr().out
    assert b"3 False" in scores.read_bytes() and b"3 True" in scores.read_bytes() and b"4 True" in scores.read_bytes()


def test_a_search_that_is_interrupted_goes_on(teacher_dir, alice_json, tmp_path, monkeypatch, capsys):
    options = {"layers": 2, "data": alice(alice_json), "records": 10, "kl_records": 3, "keep_ends": False}
    make_student(teacher_dir, tmp_path / "whole", **options)
    keep, calls = Scores.keep_removed, []

    def interrupted(scores: Scores, *arguments: object) -> None:
        keep(scores, *arguments)
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scores, "keep_removed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_student(teacher_dir, tmp_path / "student", scores=tmp_path / "scores", **options)
    assert not (tmp_path / "student").exists()
    capsys.readouterr()
    make_student(teacher_dir, tmp_path / "student", scores=tmp_path / "scores", **options)
    assert "Removing 1 more layers" in capsys.readouterr().out
    for file in ("lit_model.pth", "make_student.json"):
        assert (tmp_path / "student" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_scores_of_something_else_or_damaged_are_refused(teacher_dir, alice_json, tmp_path):
    scores, options = tmp_path / "scores", {"layers": 3, "data": alice(alice_json), "method": "block_influence"}
    options |= {"scores": scores}
    make_student(teacher_dir, tmp_path / "student", records=6, **options)
    whole = scores.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(teacher_dir, other)
    weights = torch.load(other / "lit_model.pth", weights_only=True)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"] * 2
    torch.save(weights, other / "lit_model.pth")
    damaged = {"cut": whole[:1000], "empty": b"", "other": b"x" * 100}
    damaged["one bit"] = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    at = whole.index(b"identity") + 40
    damaged["a letter"] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    cases = [
        (whole, {"records": 7}, teacher_dir, "--scores .* is of something else: records .* -> "),
        (whole, {"records": 6, "max_seq_length": 30}, teacher_dir, "is of something else: records"),
        (whole, {"records": 6, "precision": "bf16-true"}, teacher_dir, "precision 32-true -> bf16-true"),
        (whole, {"records": 6}, other, "is of something else: teacher"),
        *((content, {"records": 6}, teacher_dir, "cannot be read as scores") for content in damaged.values()),
    ]
    for content, changes, teacher, message in cases:
        scores.write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            make_student(teacher, tmp_path / "new", **options, **changes)
        assert "Name another file by --scores, or remove this one." in str(raised.value)
        assert scores.read_bytes() == content and not (tmp_path / "new").exists()
    # the way out
    scores.unlink()
    make_student(other, tmp_path / "new", records=6, **options)
