"""A `step-...` directory: what it holds, what is found when it is damaged, and which are kept."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import IDENTITY, draw, find, make_state, names, save, save_steps, train

from litgpt_akl.files.manifest import KNOWN, MANIFEST, damage, read_manifest, write_manifest
from litgpt_akl.messages import UserError
from litgpt_akl.training.checkpoint import load_training_state, read_training_state
from litgpt_akl.training.metrics import copy_marked_rows


@pytest.fixture
def saved(student_dir, tmp_path) -> Path:
    """A run that saved steps 1, 2 and 10."""
    save_steps(tmp_path / "out", student_dir, [1, 2, 10])
    return tmp_path / "out"


def test_going_on_is_as_if_never_stopped(student_dir, tmp_path):
    state = make_state() | {"epoch": 1, "tokens": 30, "start_cross_entropy": 4.5}
    (tmp_path / "logs.csv").write_text("step,loss\n3,1.5\n")
    train(state, 3)
    state |= {"last_validation": 3, "validation_loss": 1.25, "nonfinite_in_a_row": 1}
    directory = save(tmp_path, state, student_dir)
    train(state, 3)
    expected = draw()
    resumed = make_state(seed=1) | {"data": "another", "models": "others"}
    train(resumed, 1)
    load_training_state(directory, resumed)
    assert resumed["step_count"] == 3
    train(resumed, 3)
    assert draw() == expected
    for name, value in state.items():
        if hasattr(value, "state_dict"):
            torch.testing.assert_close(resumed[name].state_dict(), value.state_dict(), rtol=0, atol=0)
        elif name not in IDENTITY:
            assert resumed[name] == value, name
    assert (resumed["data"], resumed["models"]) == ("another", "others")
    assert {name: read_training_state(directory)[name] for name in IDENTITY} == IDENTITY
    assert copy_marked_rows(directory, 3, tmp_path / "next.csv") == (["step", "loss"], None)
    assert (tmp_path / "next.csv").read_text() == "step,loss\n3,1.5\n"
    manifest = read_manifest(directory)
    assert (manifest["step"], manifest["validation_loss"]) == (3, 1.25)
    assert {*manifest["files"], MANIFEST} == set(names(directory)) >= {"tokenizer.json", "hyperparameters.yaml"}
    assert read_manifest(save(tmp_path, state, student_dir))["validation_loss"] is None


def truncate(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    return f"{path.name} has {size // 2:,} bytes, {size:,} were written"


def empty(path: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, 0)
    return f"{path.name} has 0 bytes, {size:,} were written"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"{path.name} has changed (checksum)"


def remove(path: Path) -> str:
    path.unlink()
    return f"lacks {path.name}"


@pytest.mark.parametrize("harm", [truncate, empty, flip_a_bit, remove])
def test_damage_to_any_file_is_named_and_the_one_before_is_used(saved, harm):
    newest, spare = saved / "step-000010", saved / "spare"
    newest.rename(spare)
    for name in set(names(spare)) - {MANIFEST}:
        shutil.copytree(spare, newest)
        what = harm(newest / name)
        assert damage(newest) == what
        found, warnings = find("auto", saved)
        assert found == find(True, saved)[0] == saved / "step-000002"
        assert warnings == [f"{newest} is damaged ({what}); going on from step-000002 instead."]
        with pytest.raises(UserError) as caught:
            find(newest / name, saved)
        assert what in str(caught.value) and f"{saved / 'step-000002'} is whole" in str(caught.value)
        shutil.rmtree(newest)


def test_damage_to_the_manifest_is_found_wherever_it_is(saved):
    manifest = saved / "step-000010" / MANIFEST
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << random.randrange(8)]) + whole[place + 1 :])
        assert MANIFEST in (damage(manifest.parent) or ""), place
    for content in (b"", b"null", b"[1]", b"{}", b"\xff", whole[:-3]):
        manifest.write_bytes(content)
        assert damage(manifest.parent) == f"{MANIFEST} is garbled"
    manifest.write_text(json.dumps({**json.loads(whole), "format": 2}))
    assert damage(manifest.parent) == f"{MANIFEST} has format 2, this version reads 1"
    manifest.unlink()
    found, warnings = find(True, saved)
    assert found == saved / "step-000002" and f"has no {MANIFEST}" in warnings[0]


def test_steps_are_read_from_manifests(saved):
    assert find(True, saved) == find("auto", saved) == (saved / "step-000010", [])
    (saved / "step-000010").rename(saved / "step-latest-copy")
    (saved / "step-000001").rename(saved / "step-zzz")
    assert find(True, saved) == (saved / "step-latest-copy", [])
    for given in (saved / "step-zzz", saved / "step-zzz" / "lit_model.pth"):
        assert find(given, saved.parent / "new")[0] == saved / "step-zzz"
        with pytest.raises(UserError, match="has checkpoints of an earlier run"):
            find(given, saved)
    assert find(False, saved.parent / "new") == (None, [])


def test_what_is_not_there_is_not_resumed(saved, student_dir, tmp_path):
    assert find("auto", tmp_path / "new") == (None, [])
    with pytest.raises(UserError, match="has no step-... directory"):
        find(True, tmp_path / "new")
    for missing, reason in (
        (saved / "step-000003", "does not exist"),
        (saved / "step-000003" / "lit_model.pth", "does not exist"),
        (student_dir, f"has no {MANIFEST}"),
    ):
        with pytest.raises(UserError, match=reason):
            find(missing, saved)
    for path in (saved / "step-000003", saved):
        with pytest.raises(UserError, match=f"{saved / 'step-000010'} is whole"):
            find(path, saved)
    for directory in saved.iterdir():
        truncate(directory / "lit_model.pth")
    for resume in (True, "auto"):
        with pytest.raises(UserError, match=r"no checkpoint in \S+ is whole: step-000010 \(lit_model.pth has"):
            find(resume, saved)


def test_the_newest_and_the_best_are_kept(student_dir, tmp_path):
    def save_step(step: int, loss: float | None, keep_last: int | None) -> list[str]:
        state = {**make_state(), "step_count": step}
        validation = {} if loss is None else {"last_validation": step, "validation_loss": loss}
        save(tmp_path, {**state, **validation}, student_dir, keep_last)
        return [str(int(name.removeprefix("step-"))) for name in names(tmp_path)]

    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, None), (5, float("nan"))):
        kept = save_step(step, loss, keep_last=None)
    assert kept == ["1", "2", "3", "4", "5"]
    assert save_step(6, 2.5, keep_last=2) == ["3", "5", "6"]
    # of an abandoned branch the newest count on, but what was just written stays
    assert save_step(4, None, keep_last=1) == ["3", "4", "6"]
    flip_a_bit(tmp_path / "step-000003" / "lit_model.pth")
    truncate(tmp_path / "step-000006" / "training_state.pth")
    assert save_step(7, None, keep_last=2) == ["3", "4", "6", "7"]
    assert save_step(8, 9.0, keep_last=1) == ["3", "6", "8"]


def test_what_cannot_be_removed_does_not_end_a_run(saved, student_dir):
    (saved / ".step-000001.removed").touch()
    save_steps(saved, student_dir, [11], keep_last=1)
    assert names(saved) == [".step-000001.removed", "step-000001", "step-000011"]


def test_a_save_beside_many_kept_checkpoints_reads_none_of_them_again(student_dir, tmp_path):
    (step,) = save_steps(tmp_path, student_dir, [1])
    for number in range(2, 421):
        shutil.copytree(step, tmp_path / f"step-{number:06d}", copy_function=os.link, ignore=lambda *_: [MANIFEST])
        other = tmp_path / f"step-{number:06d}"
        for name in ("hyperparameters.yaml", *(f"more-{n}" for n in range(8))):
            (other / name).unlink(missing_ok=True)
            (other / name).write_bytes(os.urandom(2000))
        write_manifest(other, number, None)
    files = sum(len(read_manifest(path)["files"]) for path in tmp_path.glob("step-*"))
    assert files > KNOWN
    read = []
    for number in (1001, 1002, 1003):
        before = int(Path("/proc/self/io").read_text().split()[1])
        save(tmp_path, {**make_state(), "step_count": number}, student_dir, keep_last=1000)
        read.append(int(Path("/proc/self/io").read_text().split()[1]) - before)
    manifests = sum((path / MANIFEST).stat().st_size for path in tmp_path.glob("step-*"))
    # what is read each time are the manifests, which are asked for their step and more
    others = sum(path.stat().st_size for path in tmp_path.glob("step-*/more-*"))
    assert others > 6_000_000
    assert read[2] < 7 * manifests + 2 * sum(path.stat().st_size for path in step.iterdir())
