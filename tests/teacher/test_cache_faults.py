"""What can go wrong with a cache: it is refused, or repaired, and never silently wrong."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from helpers.cache_runs import assert_equal, chunks, fill, run
from helpers.ranks import in_processes
from helpers.runs import short_data
from litgpt.prompts import Alpaca

from litgpt_akl.messages import UserError
from litgpt_akl.teacher import cache as cache_module
from litgpt_akl.teacher.cache import TeacherCache

ONE_EPOCH = {"train": {"epochs": 1}}


@pytest.fixture(scope="module")
def live(student_dir, teacher_dir, alice_json, tmp_path_factory) -> dict[str, torch.Tensor]:
    directory = tmp_path_factory.mktemp("live")
    return run(student_dir, teacher_dir, short_data(alice_json, directory / "short"), directory / "run", **ONE_EPOCH)


@pytest.fixture(scope="module")
def whole(student_dir, teacher_dir, alice_json, tmp_path_factory) -> Path:
    """A cache of several chunks. Do not change it."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "CHUNK_BYTES", 300_000)
        data = short_data(alice_json, directory / "short")
        fill(student_dir, teacher_dir, data, directory / "none", directory / "cache", **ONE_EPOCH)
    assert len(chunks(directory / "cache")) > 3
    return directory / "cache"


@pytest.fixture
def filled(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, which goes on in chunks of that size."""
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 300_000)
    return shutil.copytree(whole, tmp_path / "cache")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "length of the header": lambda path: flip(path, 0),
    "header": lambda path: flip(path, 30),
    "index": lambda path: flip(path, path.read_bytes().index(b"}}") + 20),
    "hidden state": lambda path: flip(path, path.stat().st_size - 5),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "truncated in the header": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "of another": lambda path: path.rename(path.with_name("0" * 32 + path.suffix)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_filled_again(student_dir, teacher_dir, short, live, filled, tmp_path, capsys, damage):
    path, others = chunks(filled)[1], chunks(filled)[2:]
    stamps = [other.stat().st_mtime_ns for other in others]
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="damaged|lacks .* training samples"):
        run(student_dir, teacher_dir, short, tmp_path / "reading", filled, mode="read", **ONE_EPOCH)
    assert_equal(live, run(student_dir, teacher_dir, short, tmp_path / "mending", filled, **ONE_EPOCH))
    assert damage == "missing" or "is damaged" in capsys.readouterr().err
    assert_equal(live, run(student_dir, teacher_dir, short, tmp_path / "again", filled, mode="read", **ONE_EPOCH))
    assert [other.stat().st_mtime_ns for other in others] == stamps


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_that_shows_up_in_the_middle_brings_the_teacher_back(
    student_dir, teacher_dir, short, live, filled, tmp_path, capfd, workers
):
    short.num_workers = workers
    DAMAGES["hidden state"](chunks(filled)[-1])
    found = run(student_dir, teacher_dir, short, tmp_path / "run", filled, **ONE_EPOCH)
    said = capfd.readouterr()
    assert "all there: the teacher's body is not needed" in said.out and "is damaged" in said.err
    assert_equal(live, found)


def fail_to_read(monkeypatch, times: int, first: int = 0) -> list[str]:
    """Lets the next readings of bytes beyond ``first`` of a file go wrong; the files are whole. Who was read so."""
    system, failed = LocalFileSystem, []

    def damaged(self, path: str, start: int | None = None, end: int | None = None, **options) -> bytes:
        content = read(self, path, start=start, end=end, **options)
        if start is None or start < first or len(failed) == times:
            return content
        failed.append(path)
        return bytes([content[0] ^ 1]) + content[1:]

    read = system.cat_file
    monkeypatch.setattr(system, "cat_file", damaged)
    return failed


@pytest.mark.parametrize("mode", ["auto", "read"])
@pytest.mark.parametrize(("times", "first"), [(1, 0), (1, 1), (2, 1)])
def test_what_is_read_wrongly_and_is_whole_is_not_given_up(
    student_dir, teacher_dir, short, live, filled, tmp_path, monkeypatch, times, first, mode
):
    before = {path: path.read_bytes() for path in chunks(filled)}
    failed = fail_to_read(monkeypatch, times, first)
    if times == 2 and mode == "read":
        cache = TeacherCache(str(filled / "training"), 40, torch.float32, 128, writable=False)
        cache.verify()
    else:
        assert_equal(live, run(student_dir, teacher_dir, short, tmp_path / "run", filled, mode=mode, **ONE_EPOCH))
    assert len(failed) == times
    assert {path: path.read_bytes() for path in chunks(filled)} == before


def test_records_that_are_whole_outlive_their_damaged_chunk(filled):
    path = chunks(filled)[0]
    DAMAGES["hidden state"](path)
    cache = TeacherCache(str(filled / "training"), 40, torch.float32, 128, writable=True)
    there = len(cache.present())
    cache.verify()
    assert len(cache.present()) == there - 1 and not path.exists()
    assert len(TeacherCache(str(filled / "training"), 40, torch.float32, 128, writable=False).present()) == there - 1


@pytest.mark.parametrize("kind", ["flipped", "missing"])
def test_a_damaged_head_is_written_again(student_dir, teacher_dir, short, live, filled, tmp_path, kind):
    head = next(filled.glob("head-*"))
    flip(head, 2000) if kind == "flipped" else head.unlink()
    with pytest.raises(UserError, match="LM head .* is missing or damaged"):
        run(student_dir, teacher_dir, short, tmp_path / "reading", filled, mode="read", **ONE_EPOCH)
    for name, mode in (("mending", "auto"), ("again", "read")):
        assert_equal(live, run(student_dir, teacher_dir, short, tmp_path / name, filled, mode=mode, **ONE_EPOCH))


@pytest.mark.parametrize("name", ["garbled", "missing"])
def test_a_cache_that_does_not_say_what_it_is_of(student_dir, teacher_dir, short, filled, tmp_path, name):
    identity = filled / "cache.json"
    identity.write_text("{") if name == "garbled" else identity.unlink()
    with pytest.raises(UserError, match="is garbled" if name == "garbled" else "has no cache.json"):
        run(student_dir, teacher_dir, short, tmp_path / "run", filled, mode="read", **ONE_EPOCH)


def other_teacher(teacher: Path, data, base: Path) -> dict:
    weights = torch.load(teacher / "lit_model.pth", weights_only=True)
    copy = shutil.copytree(teacher, base / "other" / teacher.name)
    torch.save({name: 1.5 * weight for name, weight in weights.items()}, copy / "lit_model.pth")
    return {"teacher": copy}


def other_tokenizer(teacher: Path, data, base: Path) -> dict:
    copy = shutil.copytree(teacher, base / "other" / teacher.name)
    text = json.loads((copy / "tokenizer.json").read_text())
    name = next(iter(text["model"]["vocab"]))
    text["model"]["vocab"]["#unheard"] = text["model"]["vocab"].pop(name)
    (copy / "tokenizer.json").write_text(json.dumps(text))
    return {"teacher": copy, "student": copy}


def other_style(teacher: Path, data, base: Path) -> dict:
    data.prompt_style = Alpaca()
    return {"train": {"max_seq_length": 128}}


def other_data(teacher: Path, data, base: Path) -> dict:
    path = data.json_path / "train.json"
    records = json.loads(path.read_text())
    # as long as before
    records[0], records[5] = records[5], records[0]
    path.write_text(json.dumps(records))
    return {}


DIFFERENCES = {
    "teacher_weights": other_teacher,
    "tokenizer": other_tokenizer,
    "prompt_style": other_style,
    "max_seq_length": lambda teacher, data, base: {"train": {"max_seq_length": 60}},
    "mask_prompt": lambda teacher, data, base: data.__setattr__("mask_prompt", False) or {},
    "teacher_precision": lambda teacher, data, base: {"teacher_precision": "bf16-true"},
    "stored_as": lambda teacher, data, base: {"dtype": "bf16"},
    "another sample": other_data,
}


@pytest.mark.parametrize("mode", ["auto", "read", "fill"])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_foreign_cache_is_refused_and_left_alone(student_dir, teacher_dir, short, filled, tmp_path, difference, mode):
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    changes = DIFFERENCES[difference](teacher_dir, short, tmp_path)
    models = changes.pop("student", student_dir), changes.pop("teacher", teacher_dir)
    changes["train"] = ONE_EPOCH["train"] | changes.get("train", {})
    with pytest.raises(UserError, match=difference):
        run(*models, short, tmp_path / "run", filled, mode=mode, **changes)
    assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before


def fill_quickly(*arguments) -> None:
    """With a chunk for nearly every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "CHUNK_BYTES", 100_000)
        fill(*arguments, **ONE_EPOCH)


def test_killed_ten_times_while_filling(student_dir, teacher_dir, short, live, tmp_path):
    cache, kills, sizes = tmp_path / "cache", 0, [0]
    arguments = student_dir, teacher_dir, short, tmp_path / "none", cache
    while kills < 10:
        child = os.fork()
        if child == 0:
            os.setsid()
            fill_quickly(*arguments)
            os._exit(0)
        start = len(chunks(cache))
        deadline = time.monotonic() + 60
        # at least one more chunk, and then any moment
        while len(chunks(cache)) == start and time.monotonic() < deadline and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(random.random() * 0.03)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            # it was quicker: begin again with an empty cache
            shutil.rmtree(cache)
            continue
        kills += 1
        sizes.append(len(chunks(cache)))
        if len(chunks(cache)) > 12:
            shutil.rmtree(cache)
    fill_quickly(*arguments)
    assert_equal(live, run(student_dir, teacher_dir, short, tmp_path / "run", cache, mode="read", **ONE_EPOCH))


def test_two_jobs_fill_one_folder(student_dir, teacher_dir, short, live, tmp_path):
    cache, children = tmp_path / "cache", []
    for number in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            fill_quickly(student_dir, teacher_dir, short, tmp_path / f"none{number}", cache)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert_equal(live, run(student_dir, teacher_dir, short, tmp_path / "run", cache, mode="read", **ONE_EPOCH))


def test_a_resumed_run_reads_what_the_whole_one_has_read(student_dir, teacher_dir, short, tmp_path):
    options = {"train": {"epochs": 3, "save_interval": 4}, "eval": {"initial_validation": False}}
    whole = run(student_dir, teacher_dir, short, tmp_path / "whole", tmp_path / "first", **options)
    shutil.copytree(tmp_path / "whole" / "step-000004", tmp_path / "resumed" / "step-000004")
    # as a run leaves it that is killed after its fourth step
    cache = tmp_path / "second"
    stopped = {**options, "train": options["train"] | {"max_steps": 4}}
    run(student_dir, teacher_dir, short, tmp_path / "stopped", cache, **stopped)
    resumed = run(student_dir, teacher_dir, short, tmp_path / "resumed", cache, resume="auto", **options)
    assert_equal(whole, resumed)


def test_a_full_disk(student_dir, teacher_dir, short, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="cache/training cannot be written .*; .* bytes are free"):
            run(student_dir, teacher_dir, short, tmp_path / "none", cache, mode="fill", **ONE_EPOCH)

    in_processes(1, limited)
    assert chunks(cache) == [] and not list(cache.glob("**/.*"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs 1.5 MB, and its disk has 1.0 KB free"):
        run(student_dir, teacher_dir, short, tmp_path / "none", cache, mode="fill", **ONE_EPOCH)
