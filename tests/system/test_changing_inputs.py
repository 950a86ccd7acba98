"""What a run reads may be changed, cut, replaced or removed under it: another result is never a quiet one."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers.commands import complete_call
from helpers.runs import distil
from litgpt.args import TrainArgs
from litgpt.data import JSON
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer

from litgpt_akl.cli.main import without_traceback
from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.data import StreamingSFT, preparation
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.files.manifest import MANIFEST, damage
from litgpt_akl.messages import UserError
from litgpt_akl.models.weights import model_paths
from litgpt_akl.training import main as main_module
from litgpt_akl.training import setup

WITHOUT_VALIDATION = {"initial_validation": False, "final_validation": False}
NOTHING_ELSE = "Give the command again once nothing else writes there."


def edit(path: Path) -> None:
    """Change a file in its place, and let it still be what it was to whoever reads it."""
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(first)


def replace(path: Path) -> None:
    """Put a copy in a file's place."""
    copy = shutil.copyfile(path, path.with_name("copy"))
    Path(copy).rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {"edited": edit, "replaced": replace, "removed": os.unlink}


def calls_before(monkeypatch, module, name: str, act: Callable[[], None], after: bool = False) -> None:
    """From now on ``act`` is called once, before or after the real function is."""
    real, done = getattr(module, name), []

    def wrapper(*arguments, **options):
        if not after and not done:
            done.append(act())
        result = real(*arguments, **options)
        if after and not done:
            done.append(act())
        return result

    monkeypatch.setattr(module, name, wrapper)


@pytest.fixture
def pair(student_dir: Path, teacher_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may change."""
    found = {"student": student_dir, "teacher": teacher_dir}
    return {role: shutil.copytree(path, tmp_path / "models" / role / path.name) for role, path in found.items()}


def contents(directory: Path) -> dict[str, bytes]:
    # what names the directory that the student came from differs by that alone
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in ("hyperparameters.yaml",)}


@pytest.mark.parametrize("change", ["removed", "moved", "edited", "emptied"])
def test_a_student_whose_directory_changes_during_training_is_written_as_it_was(
    tmp_path, pair, short, monkeypatch, change
):
    options = {"train": {"save_interval": 1, "max_steps": 2}, "eval": WITHOUT_VALIDATION}
    distil(pair["student"], pair["teacher"], short, tmp_path / "alone", **options)

    def act() -> None:
        if change == "removed":
            shutil.rmtree(pair["student"])
        elif change == "moved":
            pair["student"].rename(tmp_path / "elsewhere")
        else:
            for path in model_paths(pair["student"]):
                path.write_bytes(b"{}" if change == "edited" else b"")

    calls_before(monkeypatch, main_module, "report_accuracy", act)
    distil(pair["student"], pair["teacher"], short, tmp_path / "out", **options)
    for name in ("final", "step-000001", "step-000002"):
        found, expected = contents(tmp_path / "out" / name), contents(tmp_path / "alone" / name)
        assert found.keys() == expected.keys() and damage(tmp_path / "out" / name) is None
        for file in found.keys() - {MANIFEST, "metrics.csv", "metrics.json", "training_state.pth"}:
            assert found[file] == expected[file], (name, file)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["data is prepared", "weights are read"])
def test_a_model_that_changes_while_it_is_read_is_refused(tmp_path, pair, short, monkeypatch, change, moment):
    """Every file of both models; a teacher has no part in the preparation of data, and is asked for later."""
    for role, directory in pair.items():
        for path in model_paths(directory):
            kept = path.read_bytes()
            with monkeypatch.context() as patch:
                module, name = (setup, "prepare_datasets") if moment == "data is prepared" else (setup, "identity")
                calls_before(patch, module, name, lambda path=path: CHANGES[change](path), after=True)
                with pytest.raises(UserError) as refusal:
                    distil(pair["student"], pair["teacher"], short, tmp_path / "out")
            said = "removed" if change == "removed" else "changed or replaced"
            lines = str(refusal.value).split("\n")
            # one that cannot be opened any more may be missed before it is asked for
            assert str(path) in lines[0] or change == "removed", (role, path, lines)
            assert change == "removed" or (said in lines[0] and lines[1] == NOTHING_ELSE)
            assert not (tmp_path / "out" / "final").exists()
            path.write_bytes(kept)
    (pair["student"] / "chat_template.jinja").unlink(missing_ok=True)
    added = pair["student"] / "chat_template.jinja"
    calls_before(monkeypatch, setup, "prepare_datasets", lambda: added.write_text("{{ messages }}"))
    with pytest.raises(UserError, match="chat_template.jinja was added while"):
        distil(pair["student"], pair["teacher"], short, tmp_path / "out")


def test_a_checkpoint_that_changes_while_it_is_resumed_is_refused(
    tmp_path, student_dir, teacher_dir, short, monkeypatch
):
    options = {"train": {"save_interval": 1, "max_steps": 2}, "eval": WITHOUT_VALIDATION}
    distil(student_dir, teacher_dir, short, tmp_path / "out", **options)
    step = tmp_path / "out" / "step-000001"

    def flip() -> None:
        with (step / "lit_model.pth").open("r+b") as file:
            file.seek(-2000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    calls_before(monkeypatch, setup, "load_training_state", flip)
    with pytest.raises(UserError, match="step-000001 was changed while this command was reading it"):
        distil(student_dir, teacher_dir, short, tmp_path / "out", resume=step, overwrite=True, **options)


@pytest.mark.parametrize("command", ["make_student", "export_hf", "evaluate_akl"])
def test_other_commands_refuse_a_model_that_changes_meanwhile(tmp_path, pair, short, monkeypatch, command):
    out = tmp_path / "made"
    reads = {"make_student": "models.student_checkpoint.write_weights", "export_hf": "models.export.write"}
    module, _, reader = reads.get(command, "commands.evaluate_akl.load_frozen").rpartition(".")
    module = sys.modules[f"litgpt_akl.{module}"]
    for path in [pair["teacher"] / "lit_model.pth", pair["teacher"] / "tokenizer.json"]:
        with monkeypatch.context() as patch:
            calls_before(patch, module, reader, lambda path=path: edit(path))
            with pytest.raises(UserError, match=f"{path} was changed or replaced"):
                if command == "make_student":
                    make_student(pair["teacher"], out, layers=2)
                elif command == "export_hf":
                    export_hf(pair["teacher"], out)
                else:
                    evaluate_akl(pair["student"], teacher_checkpoint_dir=pair["teacher"], data=short, out_dir=out)
        assert not out.exists() or not any(path for path in out.rglob("*") if path.name != ".lock" and path.is_file())


def records(count: int) -> list[dict]:
    return [{"instruction": f"count to {n}", "output": "one two three " * (n % 7 + 1)} for n in range(count)]


def write_records(path: Path, count: int) -> Path:
    rows = records(count)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def open_stores(data, tokenizer_dir: Path) -> tuple:
    return prepare_datasets(data, Tokenizer(tokenizer_dir), TrainArgs(lr_warmup_steps=None), 512, tokenizer_dir)


def data_of(path: Path, kind: str, cache_dir: Path):
    if kind == "JSON":
        return JSON(path, val_split_fraction=0.1, prompt_style=Default(), num_workers=0, mask_prompt=True)
    return StreamingSFT(str(path), cache_dir=cache_dir, prompt_style=Default(), num_proc=1)


def cut_at_a_record(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, sum(map(len, lines[: len(lines) // 2])))


@pytest.mark.parametrize(
    "kind, suffix", [("JSON", "json"), ("JSON", "jsonl"), ("StreamingSFT", "jsonl"), ("StreamingSFT", "parquet")]
)
@pytest.mark.parametrize("change", ["cut", "appended", *CHANGES])
def test_data_that_changes_while_it_is_prepared_is_refused(
    tmp_path, teacher_dir, prepared_data, monkeypatch, kind, suffix, change
):
    path = write_records(tmp_path / f"data.{suffix}", 800)
    whole = path.read_bytes()
    cache_dir = prepared_data / "litgpt_akl" if kind == "JSON" else tmp_path / "cache"
    before = set(cache_dir.glob("*"))

    def act() -> None:
        if change == "cut" and suffix == "jsonl":
            cut_at_a_record(path)
        elif change == "cut":
            os.truncate(path, len(whole) // 2)
        elif change == "appended":
            with path.open("ab") as file:
                file.write(b"\n" if suffix != "parquet" else whole[-4:])
        else:
            CHANGES[change](path)

    # the first records have been read by then
    calls_before(monkeypatch, preparation.Rows, "_row", act)
    with pytest.raises(UserError) as refusal:
        open_stores(data_of(path, kind, cache_dir), teacher_dir)
    assert str(path) in str(refusal.value) and len(str(refusal.value).split("\n")) <= 2
    left = {entry for entry in set(cache_dir.glob("*")) - before if entry.suffix != ".lock"}
    assert not left, "nothing half-prepared is found by the next"
    monkeypatch.undo()
    path.write_bytes(whole)
    assert sum(map(len, open_stores(data_of(path, kind, cache_dir), teacher_dir))) == 800


def spoil(path: Path, fault: str) -> None:
    if fault == "gone":
        path.unlink()
    elif fault == "empty":
        os.truncate(path, 0)
    elif fault == "cut":
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif fault == "directory":
        path.unlink()
        path.mkdir()
    elif fault == "longer":
        with path.open("ab") as file:
            file.write(b"\0")
    else:
        content = bytearray(path.read_bytes())
        content[round(float(fault) * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["JSON", "StreamingSFT"])
@pytest.mark.parametrize("fault", ["gone", "empty", "cut", "directory", "longer", "0", "0.3", "0.5", "0.9", "1"])
def test_damaged_prepared_data_is_made_again(tmp_path, teacher_dir, prepared_data, capsys, kind, fault):
    path = write_records(tmp_path / "data.jsonl", 250)
    cache_dir = prepared_data / "litgpt_akl" if kind == "JSON" else tmp_path / "cache"
    before = set(cache_dir.glob("*"))
    expected = open_stores(data_of(path, kind, cache_dir), teacher_dir)
    (folder,) = (entry for entry in set(cache_dir.glob("*")) - before if entry.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    assert MANIFEST in names and len(names) >= 2
    for name in names:
        capsys.readouterr()
        spoil(folder / name, fault)
        found = open_stores(data_of(path, kind, cache_dir), teacher_dir)
        assert capsys.readouterr().err.count("preparing it again") == 1, name
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.fingerprint == theirs.fingerprint and len(ours) == len(theirs)
            for one, other in zip(*(dataset.read(np.arange(len(dataset))) for dataset in (ours, theirs)), strict=True):
                assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["labels"], other["labels"])
        assert sorted(entry.name for entry in folder.iterdir()) == names
    open_stores(data_of(path, kind, cache_dir), teacher_dir)
    assert "again" not in capsys.readouterr().err


def test_two_processes_prepare_the_same_data_one_after_the_other(tmp_path, teacher_dir, capsys):
    path = write_records(tmp_path / "data.jsonl", 100)
    data = data_of(path, "StreamingSFT", tmp_path / "cache")
    open_stores(data, teacher_dir)
    (folder,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    shutil.rmtree(folder)
    lock = f"{folder}.lock"
    code = f"from filelock import FileLock; import time\nwith FileLock({lock!r}): print(flush=True); time.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        begin = time.monotonic()
        open_stores(data, teacher_dir)
        assert time.monotonic() - begin >= 1.5 and folder.is_dir() and other.wait(timeout=60) == 0
    assert capsys.readouterr().err.count("Waiting for another process, which prepares the same data") == 1


def open_as_somebody_else(base: Path) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    train, validation = open_stores(data_of(base / "data.jsonl", "StreamingSFT", base / "cache"), base)
    print(len(train) + len(validation))
    data = data_of(base / "other.jsonl", "StreamingSFT", base / "cache")
    with pytest.raises(UserError, match="cache/.* cannot be written .*Permission denied") as refusal:
        open_stores(data, base)
    print(str(refusal.value).splitlines()[-1])


def test_prepared_data_that_may_only_be_read_is_read(teacher_dir):
    with tempfile.TemporaryDirectory() as base:
        shutil.copytree(teacher_dir, base, dirs_exist_ok=True)
        path, cache_dir = write_records(Path(base) / "data.jsonl", 50), Path(base) / "cache"
        write_records(Path(base) / "other.jsonl", 40)
        open_stores(data_of(path, "StreamingSFT", cache_dir), teacher_dir)
        for place in (cache_dir, *cache_dir.rglob("*")):
            place.chmod(0o555 if place.is_dir() else 0o444)
        Path(base).chmod(0o755)
        finished = complete_call(partial(open_as_somebody_else, Path(base)))
        for place in (cache_dir, *cache_dir.rglob("*")):
            place.chmod(0o755)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == "50" and "Give another directory with --data.cache_dir." in lines[1]


def distil_and_act(act: Callable[[], None], *arguments: Any) -> None:
    """A run, with something done once its data is prepared; for a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        calls_before(patch, main_module, "report_accuracy", act, after=True)
        options = {"train": {"save_interval": 1}, "eval": WITHOUT_VALIDATION}
        without_traceback(distil)(*arguments, **options)


@pytest.mark.parametrize(
    "change, workers", [("cut", 0), ("cut", 2), ("edited", 0), ("edited", 2), ("replaced", 2), ("removed", 0)]
)
def test_prepared_data_that_changes_while_it_is_read_ends_a_run_in_two_lines(
    tmp_path, student_dir, teacher_dir, workers, change
):
    path = write_records(tmp_path / "data.jsonl", 3000)
    cache_dir, out = tmp_path / "cache", tmp_path / "out"

    def act() -> None:
        file = next(cache_dir.glob("*/*.arrow"))
        if change == "cut":
            os.truncate(file, 0)
        elif change == "edited":
            with file.open("r+b") as opened:
                opened.seek(90_000)
                opened.write(b"x")
        elif change == "replaced":
            new = file.with_name("new")
            new.write_bytes(bytes(9))
            new.rename(file)
        else:
            file.unlink()

    data = StreamingSFT(str(path), cache_dir=cache_dir, prompt_style=Default(), num_workers=workers, num_proc=1)
    finished = complete_call(partial(distil_and_act, act, student_dir, teacher_dir, data, out))
    assert "Traceback" not in finished.stderr, finished.stderr
    if change in ("replaced", "removed"):
        # what was opened is still there for this run
        assert finished.returncode == 0 and damage(out / "final") is None, finished.stderr
        return
    lines = finished.stderr.strip().splitlines()
    assert finished.returncode == 1 and not (out / "final").exists()
    assert ".arrow was c" in lines[-2] and lines[-1] == NOTHING_ELSE, lines
    assert "bus error" not in finished.stderr.lower()
    assert not (out / "step-000001").exists() or change == "cut"
