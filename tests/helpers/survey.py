"""Commands on damaged material: refused, mended, harmless, or taken for good?

Each runs in a copy of this process, in a copy of all material that always has the same path.
"""

import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets

from helpers.commands import fork
from helpers.faults import (
    BEFORE,
    DURING,
    OTHER_CONTENT,
    REFUSALS,
    damage_file,
    drop_privileges,
    limit_files,
    refuse_writing,
    when,
    written_path,
)
from helpers.material import KINDS, Command, Kind, make_material
from litgpt_akl.files import lock
from litgpt_akl.files.lock import LOCK
from litgpt_akl.messages import UserError

PATIENCE = 120
"""Seconds after which a command counts as hanging."""
SMALL = 200_000
"""Bytes of a file that is copied for each case; larger ones, which nobody writes into, are linked."""
RESULTS = ("refused", "mended", "harmless", "unnoticeable", "wrong", "litter", "silent", "unexplained", "traceback")
GOOD = RESULTS[:4]
REASONS = ("File too large", "Permission denied")
"""Why the system has refused to write."""
LINES = 6
"""Of a traceback, or of what was said, that are told."""
SIDE_FILES = ("logs", "report.html", "examples.json", "hyperparameters.yaml.")
"""What a command makes for people to look at, with times in it; and what such names begin, which is set aside."""
WITH_TIMES = {"metrics.json", "manifest.json"}
"""In checkpoints."""


class Outcome(NamedTuple):
    """What a command has done."""

    error: str | None
    """A UserError's message, or a traceback."""
    is_traceback: bool
    said: str
    made: dict[str, str]
    """Checksums of the files that it has made."""
    file: str
    """The damaged one."""
    how: str
    written: dict[str, bool]
    """Where it has written, in order, and whether that was a directory."""
    litter: list[str]
    """Hidden files of a command that has ended by itself."""


def checksums(directory: Path) -> dict[str, str]:
    """Of the files that a command has made, by name, apart from ``SIDE_FILES``; of some only that they are there."""
    found = {}
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and not any(part.startswith(SIDE_FILES) for part in parts):
            has_times = path.name in WITH_TIMES and parts[0].startswith("step-")
            found["/".join(parts)] = "" if has_times else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(command: Command, directory: Path, prepare: Callable[[], tuple[str, str]] | None = None) -> Outcome:
    """The command in a process of its own, in a directory with all material, after ``prepare``.

    ``prepare`` gives the name of the file that it damages, and how.
    """
    reading, writing = os.pipe()
    process = fork(partial(_work, command, directory, prepare), writing)
    os.close(writing)
    said, deadline = bytearray(), time.monotonic() + PATIENCE
    # a file would take nothing from a process that may write none, and a full pipe would stop it
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([reading], [], [], 0.01)[0]:
            said += os.read(reading, 2**16)
    hangs = process.returncode is None
    # what it has started may live on
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while more := os.read(reading, 2**16):
        said += more
    os.close(reading)
    text = said.decode(errors="replace").replace("\r", "\n")
    if not (directory / "outcome").is_file():
        how = "hangs" if hangs else f"ended with {process.returncode}"
        return Outcome(f"{how}\n{text[-2000:]}", True, text, {}, "", "", {}, [])
    error, is_traceback, file, how, written = json.loads((directory / "outcome").read_text())
    if error is None and "Traceback (most recent call last)" in text:
        error, is_traceback = f"said\n{text}", True
    hidden = _hidden_files(directory)
    return Outcome(error, is_traceback, text, checksums(directory / "out"), file, how, written, hidden)


def _work(command: Command, directory: Path, prepare: Callable[[], tuple[str, str]] | None) -> None:
    error, is_traceback, file, how = None, False, "", ""
    written: dict[str, bool] = {}

    def note(event: str, path: str | None) -> None:
        if path is not None:
            written.setdefault(path, event == "os.mkdir")

    # nobody on another machine would show a sign of life
    lock.PATIENCE = 1.0
    os.chdir(directory)
    datasets.config.HF_DATASETS_CACHE = directory / "datasets"
    Path("out").mkdir()
    drop_privileges()
    try:
        file, how = prepare() if prepare else ("", "")
        sys.addaudithook(lambda event, arguments: note(event, written_path(event, arguments)))
        command(Path("out"))
    except UserError as caught:
        error = str(caught)
    except BaseException:
        error, is_traceback = traceback.format_exc(), True
    sys.stdout.flush()
    sys.stderr.flush()
    limit_files(2**40)
    Path("outcome").write_text(json.dumps([error, is_traceback, file, how, written]))


class Survey:
    """Runs commands on copies of one directory with all material, and keeps what came out."""

    def __init__(self, base: Path, *material: Path, thorough: bool) -> None:
        """Make the material in ``base``; the other arguments are those of ``make_material``.

        What is refused is compared with what the command does undamaged if it leaves something, or if ``thorough``.
        """
        self.thorough = thorough
        self.place, self.material = base / "case", base / "material"
        self.place.mkdir()
        before = Path.cwd()
        make_material(self.place, *material)
        os.chdir(before)
        self.place.rename(self.material)
        self._hidden = set(_hidden_files(self.material))
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """By kind of file, fault and result."""
        self.bad: list[str] = []
        self._expected: dict[tuple, Outcome] = {}

    @contextlib.contextmanager
    def copied(self) -> Iterator[Path]:
        """All material, always in the same place: what a run writes names it."""

        def place(source: str, target: str) -> None:
            (os.link if os.path.getsize(source) > SMALL else shutil.copyfile)(source, target)

        shutil.copytree(self.material, self.place, copy_function=place)
        try:
            yield self.place
        finally:
            for folder, _, _ in os.walk(self.place):
                os.chmod(folder, 0o755)
            shutil.rmtree(self.place)

    def undamaged(self, command: Command, before: Command | None = None) -> Outcome:
        """What the command does with material that is whole."""
        if (command, before) not in self._expected:
            with self.copied() as directory:
                found = run(command, directory, _after(before) if before else None)
            assert found.error is None, found.error
            self._expected[command, before] = found
        return self._expected[command, before]

    def files(self, kind: Kind) -> list[str]:
        """Those of a kind, from the directory with all material; of files that are made first, as many as there are."""
        if kind.before is None:
            return [str(path.relative_to(self.material)) for path in _files(self.material, kind.pattern)]
        with self.copied() as directory:
            made = run(kind.before, directory)
            assert made.error is None, made.error
            return [str(path.relative_to(directory)) for path in _files(directory, kind.pattern)]

    def damaged_before(self, name: str, number: int, fault: str, command: Command, seed: int = 0) -> None:
        """Damage the ``number``-th file of a kind, then run the command."""
        kind, draw = KINDS[name], random.Random(seed)

        def damage() -> tuple[str, str]:
            path = _files(Path(), kind.pattern)[number]
            said = BEFORE[fault](path, draw) if fault in BEFORE else damage_file(path, draw, fault)
            return str(path), f"{fault}, {said}" if said else fault

        with self.copied() as directory:
            outcome = run(command, directory, _after(kind.before, damage) if kind.before else damage)
        strict = kind.guarded or fault not in ("gone", "cut", "bit", "byte")
        self._note(name, fault, outcome, command, strict, kind.before)

    def changed_during(self, pattern: str, number: int, fault: str, command: Command, moment: str) -> None:
        """Change the ``number``-th file of a pattern when the command is about to write to ``moment``."""

        def wait() -> tuple[str, str]:
            for path in _files(Path(), pattern):
                # the same file under another name is of the material
                content = path.read_bytes()
                path.unlink()
                path.write_bytes(content)
            when(moment, lambda: DURING[fault](_files(Path(), pattern)[number]))
            return pattern, f"{fault} before {moment} was written"

        with self.copied() as directory:
            outcome = run(command, directory, wait)
        self._note(pattern, f"{fault} during the run", outcome, command)

    def refused_writing(self, path: str, how: str, command: Command) -> None:
        """The system takes nothing for ``path``."""

        def refuse() -> tuple[str, str]:
            refuse_writing(path, how)
            return path, how

        with self.copied() as directory:
            outcome = run(command, directory, refuse)
        self._note(path, how, outcome, command)

    def in_the_way(self, path: str, command: Command) -> None:
        """Something else has the name of what the command writes: a directory of a file, a file of a directory."""
        is_directory = self.undamaged(command).written[path]

        def put() -> tuple[str, str]:
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_directory:
                target.write_bytes(OTHER_CONTENT)
            else:
                (target / "mine").mkdir(parents=True)
            return path, "in the way"

        with self.copied() as directory:
            outcome = run(command, directory, put)
        self._note(path, "in the way", outcome, command)

    def _note(
        self,
        name: str,
        fault: str,
        outcome: Outcome,
        command: Command,
        strict: bool = True,
        before: Command | None = None,
    ) -> None:
        refused = outcome.error is not None and self._hidden.issuperset(outcome.litter)
        expected = outcome if refused and not self.thorough else self.undamaged(command, before)
        result = classify(outcome, expected, strict)
        self.counts[name, fault, result] += 1
        if result not in GOOD:
            called = getattr(command, "__qualname__", "")
            tail = "\n".join((outcome.error or outcome.said).splitlines()[-LINES:])
            made = outcome.made.items() ^ expected.made.items() if not outcome.error else []
            other = sorted(name for name, _ in made)
            self.bad.append(
                f"{name}: {outcome.file}, {outcome.how}, {called}: {result} {outcome.litter} {other}\n{tail}"
            )
            print(f"{self.bad[-1]}\n", flush=True)


def _after(before: Command, damage: Callable[[], tuple[str, str]] | None = None) -> Callable[[], tuple[str, str]]:
    def prepare() -> tuple[str, str]:
        before(Path("earlier"))
        return damage() if damage else ("", "")

    return prepare


def _hidden_files(directory: Path) -> list[str]:
    return [str(path.relative_to(directory)) for path in directory.glob("*/**/.*")]


def _files(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if path.is_file())


def classify(outcome: Outcome, expected: Outcome, strict: bool) -> str:
    """One of ``RESULTS``; ``strict`` if another result is wrong, and not that of other material."""
    path, refused = Path(outcome.file), outcome.how in REFUSALS
    names = {path.name, path.parent.name, path.stem.replace("_", " "), *(REASONS if refused else ())}
    if "*" in path.name:
        names.add(path.parts[0])
    litter = {name for name in {*outcome.litter} - {*expected.litter} if Path(name).name != path.name}
    if outcome.is_traceback:
        return "traceback"
    if outcome.error is not None:
        is_named = any(name in outcome.error for name in names)
        if not is_named or len(outcome.error.splitlines()) > 2:
            return "unexplained"
        return "litter" if litter else "refused"
    # a checkpoint of the run that was itself damaged is as the fault has left it
    own = "/".join(path.parts[1:2]) if path.parts[:1] == ("out",) else None
    made, whole = (
        {name: found for name, found in files.items() if name.split("/")[0] != own}
        for files in (outcome.made, expected.made)
    )
    if made != whole and path.name in outcome.said and "The page is without" in outcome.said:
        return "mended"
    if made != whole:
        return "wrong" if strict else "unnoticeable"
    if litter:
        return "litter"
    # what a run writes for people may be missing, but not without a word; a closed folder's files can be added to
    if outcome.how.startswith("no space") and path.parts[:1] == ("out",) and path.suffix and LOCK != path.name:
        return "mended" if any(name in outcome.said for name in names) else "silent"
    return "mended" if "damaged" in outcome.said or "is renamed to" in outcome.said else "harmless"


def table(counts: Counter) -> str:
    """What came of all faults, by the kind of file and by the fault."""
    width = max(len(part) for *parts, _ in counts for part in parts) + 2
    lines = ["".ljust(width) + "".join(result.rjust(14) for result in RESULTS)]
    for at in (0, 1):
        for name in dict.fromkeys(cell[at] for cell in counts):
            numbers = [sum(n for cell, n in counts.items() if (cell[at], cell[2]) == (name, r)) for r in RESULTS]
            lines.append(name.ljust(width) + "".join(str(number or "").rjust(14) for number in numbers))
        lines.append("")
    totals = [sum(n for cell, n in counts.items() if cell[2] == result) for result in RESULTS]
    all_cells = f"all {counts.total():,}".ljust(width)
    return "\n".join([*lines, all_cells + "".join(str(total).rjust(14) for total in totals)])
