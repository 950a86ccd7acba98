"""Where a run may not read or write, or cannot link: the place and the reason are named, before anything is trained."""

import errno
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
from helpers.runs import distil

from litgpt_akl.cli.main import without_traceback
from litgpt_akl.data import StreamingSFT
from litgpt_akl.files.directories import NO_LINKS, write_file
from litgpt_akl.messages import UserError

SOMEBODY = 65534
"""A user who owns nothing; permissions mean nothing to root."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@pytest.fixture
def places(student_dir: Path, teacher_dir: Path) -> Iterator[dict[str, Path]]:
    """All that a run reads and writes, where everybody may."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        found = {
            role: shutil.copytree(path, base / "models" / role)
            for role, path in (("student", student_dir), ("teacher", teacher_dir))
        }
        found["data"] = base / "data" / "records.jsonl"
        found["data"].parent.mkdir()
        found["data"].write_text('{"instruction": "a", "output": "b c d"}\n' * 20)
        found |= {"cache": base / "cache", "out": base / "runs" / "out", "answers": base / "answers"}
        for path in (base, base / "runs", base / "cache", base / "answers"):
            path.mkdir(exist_ok=True)
        for path in [base, *base.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        yield found


def as_somebody(function: Callable[[], None]) -> str:
    """What a command says that ``function`` is, in a process of another user, if it fails; empty if it does not."""
    reading, writing = get_context("fork").Pipe(duplex=False)

    def work() -> None:
        os.setuid(SOMEBODY)
        errors = io.StringIO()
        with redirect_stderr(errors), suppress(SystemExit):
            without_traceback(function)()
            errors = io.StringIO()
        writing.send(errors.getvalue())

    process = get_context("fork").Process(target=work)
    process.start()
    writing.close()
    try:
        return reading.recv()
    finally:
        process.join(timeout=5)
        process.kill()


def run(places: dict[str, Path], **changes) -> None:
    options = {"num_proc": 1, "num_workers": 0, "cache_dir": places["cache"], **changes.pop("data", {})}
    data = StreamingSFT(str(places["data"]), **options)
    train = {"max_steps": 1, "global_batch_size": 4}
    distil(places["student"], places["teacher"], data, places["out"], train=train, **changes)


CLOSED = {
    "the student's directory": ("student", "", "student"),
    "the student's weights": ("student", "lit_model.pth", "lit_model.pth"),
    "the student's tokenizer": ("student", "tokenizer.json", "tokenizer.json"),
    "the student's configuration": ("student", "model_config.yaml", "model_config.yaml"),
    "the teacher's weights": ("teacher", "lit_model.pth", "lit_model.pth"),
    "the teacher's configuration": ("teacher", "model_config.yaml", "model_config.yaml"),
    "the directory above the models": ("student", "..", "student"),
    "the data": ("data", "", "records.jsonl"),
    "the directory of the data": ("data", "..", "records.jsonl"),
    "the directory for prepared data": ("cache", "", "cache"),
    "the directory of runs": ("out", "..", "out"),
}


@pytest.mark.parametrize("what", CLOSED)
def test_what_may_not_be_read_or_written_is_named(places, what):
    name, below, named = CLOSED[what]
    path = (places[name] / below).resolve()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    message = as_somebody(lambda: run(places))
    path.chmod(mode)
    lines = message[message.index("error: ") :].strip().splitlines()
    assert len(lines) in (1, 2) and named in lines[0], message
    assert "ermission denied" in lines[0] or "not writable" in lines[0], message
    assert not (places["out"] / "final").exists()
    run(places)
    assert (places["out"] / "final").is_dir()


ODD = ["{a,b} [x]* what? 100%d #1 ünï", "a::b", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", ["cache", "out", "student", "teacher", "data"])
def test_places_with_odd_names(places, place, name):
    """Whatever a place is called: it is used, also by a second run, or it is said why not."""
    moved = dict(places)
    if place in ("cache", "out"):
        moved[place] = places[place].with_name(name)
    else:
        moved[place] = places[place].with_name(name + places[place].suffix)
        places[place].rename(moved[place])
    for overwrite in (False, True):
        try:
            run(moved, overwrite=overwrite)
        except UserError as error:
            lines = str(error).splitlines()
            assert len(lines) == 2 and "is not UTF-8" in lines[0], error
            assert name == ODD[2] and place in ("cache", "out", "student", "teacher"), error
        else:
            assert (moved["out"] / "final" / "lit_model.pth").is_file()


@pytest.mark.parametrize("code", sorted(NO_LINKS), ids=errno.errorcode.get)
def test_file_systems_without_hard_links_take_a_teacher_cache(places, monkeypatch, code):
    def link(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    path = places["answers"] / "first"
    for content in (b"one", b"two"):
        write_file(path, content, replace=False)
    assert path.read_bytes() == b"one"
    assert not [entry for entry in places["answers"].iterdir() if entry.suffix == ".partial"]
