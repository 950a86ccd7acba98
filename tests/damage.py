"""Every kind of file that a command reads, damaged at random places: refused, mended, harmless, or taken for good?

python tests/damage.py --cases 1000 --seed 1
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from litgpt.data import JSON, LitData
from litgpt.prompts import Default, save_prompt_style
from runs import distil

from litgpt_akl.args import GenerationArgs, LoRAArgs, TeacherArgs
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.errors import UserError
from litgpt_akl.evaluate_akl import evaluate_akl
from litgpt_akl.export_hf import export_hf, write_export
from litgpt_akl.make_student import make_student
from litgpt_akl.report.examples_file import read_examples
from litgpt_akl.report.history import read_history
from litgpt_akl.report_akl import report_akl

PATIENCE = 60
"""Seconds after which a command counts as hanging."""
SMALL = 200_000
"""Bytes of a file that is copied for each case; larger ones, which nobody writes into, are linked."""
ADAPTERS = LoRAArgs(r=2)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
RESULTS = ("refused", "mended", "harmless", "unnoticeable", "wrong", "traceback")


def records() -> JSON:
    return JSON(json_path=Path("data"), mask_prompt=True, prompt_style=Default(), num_workers=0)


def train(out: Path, data=None, teacher: str = "teacher", **changes) -> None:
    """One step from the student, without a look at the validation data."""
    quiet = {"initial_validation": False, "final_validation": False} | changes.pop("eval", {})
    steps = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2} | changes.pop("train", {})
    distil(Path("student"), Path(teacher), data or records(), out, train=steps, eval=quiet, **changes)


def train_on_chats(out: Path) -> None:
    """With the student's own chat template and prompt style."""
    path = "data/chat.jsonl"
    train(out, StreamingSFT(path=path, val_path=path, cache_dir=Path("prepared"), num_workers=0, num_proc=1))


def train_on_chunks(out: Path) -> None:
    train(out, LitData("chunks", num_workers=0), train={"max_seq_length": 32})


def train_cached(out: Path) -> None:
    distil_cached(out, "auto")


def read_cache(out: Path) -> None:
    distil_cached(out, "read")


def fill(out: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        distil_cached(out, "fill")
    # what it has is what a run makes of it
    read_cache(out)


def distil_cached(out: Path, mode: str) -> None:
    options = TeacherArgs(cache_dir="cache", cache_mode=mode)
    quiet = {"initial_validation": False, "final_validation": False}
    steps = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    distil(Path("student"), Path("teacher"), records(), out, train=steps, eval=quiet, teacher=options)


def resume(run: str, **changes) -> Callable[[Path], None]:
    def go_on(out: Path) -> None:
        Path(run, "step-000001").rename(out / "step-000001")
        train(out, resume=True, train={"max_steps": 2}, **changes)
        shutil.rmtree(out / "step-000001", ignore_errors=True)

    return go_on


def evaluate(out: Path) -> None:
    options = {"max_records": 2, "generation": GenerationArgs(seeds=[])}
    evaluate_akl(Path("student"), teacher_checkpoint_dir=Path("teacher"), data=records(), out_dir=out, **options)


def report(out: Path) -> None:
    report_akl([Path("run")], out=out / "report.html")
    # the page itself holds random names
    (out / "shown").write_text(repr((read_history(Path("run")), read_examples(Path("run")))))


def halve(directory: str) -> Callable[[Path], None]:
    return lambda out: make_student(Path(directory), out / "made", layers=1)


def export(directory: str) -> Callable[[Path], None]:
    return lambda out: export_hf(Path(directory), out / "exported")


class Kind(NamedTuple):
    """Files that are read in one way."""

    pattern: str
    """From the directory with all material."""
    commands: tuple[Callable[[Path], None], ...]
    """Those that read it; quick ones more than once, which are then taken more often."""
    guarded: bool
    """Whether something says what was right: then nothing that was changed may be taken for good."""


QUICK = (export("student"),) * 4 + (halve("student"),) * 3
OF_STUDENT = (*QUICK, train, evaluate)
KINDS = {
    "weights": Kind("student/lit_model.pth", OF_STUDENT, True),
    "teacher's weights": Kind("teacher/lit_model.pth", (halve("teacher"), export("teacher"), train, evaluate), True),
    "model_config.yaml": Kind("student/model_config.yaml", OF_STUDENT, False),
    "config.json": Kind("student/config.json", OF_STUDENT, False),
    "generation_config.json": Kind("student/generation_config.json", OF_STUDENT, False),
    "tokenizer.json": Kind("student/tokenizer.json", OF_STUDENT, False),
    "tokenizer_config.json": Kind("student/tokenizer_config.json", OF_STUDENT, False),
    "prompt_style.yaml": Kind("student/prompt_style.yaml", (*QUICK, train_on_chats), False),
    "chat_template.jinja": Kind("student/chat_template.jinja", (train_on_chats,), False),
    "safetensors": Kind("hf/*.safetensors", (lambda out: train(out, teacher="hf"),), False),
    "safetensors index": Kind("hf/*.index.json", (lambda out: train(out, teacher="hf"),), False),
    "checkpoint to resume": Kind("run/step-000001/*", (resume("run"),), True),
    "manifest": Kind("run/step-000001/manifest.json", (resume("run"),), True),
    "training_state.pth": Kind("run/step-000001/training_state.pth", (resume("run"),), True),
    "LoRA checkpoint": Kind("lora/step-000001/*", (resume("lora", lora=ADAPTERS),), True),
    "checkpoint as a model": Kind("run/step-000001/*", (export("run/step-000001"), halve("run/step-000001")), True),
    "trained student": Kind("run/final/*", (export("run/final"), halve("run/final")), True),
    "cache: chunks": Kind("cache/training/*", (train_cached, read_cache, fill), True),
    "cache: LM head": Kind("cache/head-*", (train_cached, read_cache), True),
    "cache: identity": Kind("cache/cache.json", (train_cached, read_cache), False),
    "records": Kind("data/*", (train, train_on_chats), False),
    "hyperparameters.yaml": Kind("run/hyperparameters.yaml", (report,), False),
    "metrics.csv": Kind("run/logs/csv/version_0/metrics.csv", (report,), False),
    "examples.json": Kind("run/examples.json", (report,), False),
    "chunks": Kind("chunks/*.bin", (train_on_chunks,), False),
    "index of chunks": Kind("chunks/index.json", (train_on_chunks,), False),
}


def make_material(base: Path, teacher_dir: Path, student_dir: Path, alice_json: Path) -> None:
    """One file of every kind, as the commands themselves have written it."""
    shutil.copytree(teacher_dir, base / "teacher")
    shutil.copytree(student_dir, base / "student")
    save_prompt_style(Default(), base / "student")
    (base / "student" / "chat_template.jinja").write_text(TEMPLATE)
    (base / "data").mkdir()
    for name, number in (("train", 16), ("val", 3)):
        records = json.loads((alice_json / f"{name}.json").read_text())[:number]
        (base / "data" / f"{name}.json").write_text(json.dumps(records))
    chats = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in records
    ]
    (base / "data" / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    os.chdir(base)
    write_export(Path("teacher"), Path("hf"), max_shard_size="1MB")
    shutil.copyfile("teacher/model_config.yaml", "hf/model_config.yaml")
    shown = {"initial_validation": True, "max_iters": 1, "max_new_tokens": 2}
    train(Path("run"), train={"max_steps": 2, "save_interval": 1}, eval=shown)
    train(Path("lora"), train={"max_steps": 2, "save_interval": 1}, lora=ADAPTERS)
    with contextlib.suppress(FileNotFoundError):
        distil_cached(Path("unused"), "fill")
    with contextlib.suppress(ImportError):
        write_chunks(Path("chunks"))


def write_chunks(directory: Path) -> None:
    """Three chunks of tokens and their index, as litdata writes them with its TokensLoader."""
    import litdata  # noqa: F401 - without it nobody can read them

    directory.mkdir()
    chunks = []
    for number in range(3):
        ids = torch.randint(4, 1000, (320,), generator=torch.Generator().manual_seed(number))
        content = torch.tensor([1, 12, 12 + 320 * 8], dtype=torch.uint32).numpy().tobytes() + ids.numpy().tobytes()
        (directory / f"chunk-0-{number}.bin").write_bytes(content)
        chunk = {"chunk_bytes": len(content), "chunk_size": 1, "dim": 320, "filename": f"chunk-0-{number}.bin"}
        chunks.append(chunk)
    config = {"chunk_bytes": 4000, "chunk_size": None, "compression": None, "data_format": ["no_header_tensor:16"]}
    config |= {"data_spec": None, "encryption": None, "item_loader": "TokensLoader"}
    (directory / "index.json").write_text(json.dumps({"chunks": chunks, "config": config, "updated_at": "1"}))


def damage_file(path: Path, draw: random.Random) -> str:
    """Cut the file, or change one bit or one byte of it; says how."""
    content, how = bytearray(path.read_bytes()), draw.choice(("cut", "bit", "bit", "byte"))
    place = draw.choice((draw.randrange(len(content)), draw.randrange(min(len(content), 200))))
    if how == "cut":
        # of 0 bytes, too
        del content[draw.choice((place, place, len(content) - 1 - place, 0)) :]
    elif how == "bit":
        content[place] ^= 1 << draw.randrange(8)
    else:
        content[place] ^= draw.randrange(1, 256)
    path.unlink()
    path.write_bytes(content)
    return f"{how} at {place:,}"


def digest(directory: Path) -> str:
    """Of all that a command has made, apart from its logs and pages."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not {"logs", "report.html"} & {*path.relative_to(directory).parts}:
            found.update(path.relative_to(directory).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


class Outcome(NamedTuple):
    """What a command has done."""

    error: str | None
    """A UserError's message, or a traceback."""
    is_traceback: bool
    said: str
    digest: str


def run(command: Callable[[Path], None], directory: Path) -> Outcome:
    """The command in a process of its own, in a directory with all material."""
    child = os.fork()
    if child == 0:
        os.setsid()
        _work(command, directory)
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    if ended == (0, 0):
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = (directory / "said").read_text(errors="replace")
    if not (directory / "outcome").is_file():
        how = f"ended by {ended}" if ended != (0, 0) else "hangs"
        return Outcome(f"{how}\n{said[-2000:]}", True, said, "")
    error, is_traceback = json.loads((directory / "outcome").read_text())
    return Outcome(error, is_traceback, said, "" if error else digest(directory / "out"))


def _work(command: Callable[[Path], None], directory: Path) -> None:
    error, is_traceback = None, False
    os.chdir(directory)
    Path("out").mkdir()
    said = os.open("said", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        command(Path("out"))
    except UserError as caught:
        error = str(caught)
    except BaseException:
        error, is_traceback = traceback.format_exc(), True
    sys.stdout.flush()
    sys.stderr.flush()
    Path("outcome").write_text(json.dumps([error, is_traceback]))
    os._exit(0)


@contextlib.contextmanager
def copied(material: Path) -> Iterator[Path]:
    """All material in a directory of its own."""
    with tempfile.TemporaryDirectory(dir=material.parent, ignore_cleanup_errors=True) as base:
        copy = Path(base) / "case"

        def place(source: str, target: str) -> None:
            (os.link if os.path.getsize(source) > SMALL else shutil.copyfile)(source, target)

        shutil.copytree(material, copy, copy_function=place)
        yield copy


def classify(kind: Kind, path: Path, outcome: Outcome, expected: str | None) -> str:
    """One of ``RESULTS``."""
    if outcome.is_traceback:
        return "traceback"
    if outcome.error is not None:
        names = {path.name, path.parent.name, path.stem.replace("_", " ")}
        is_named = any(name in outcome.error for name in names)
        return "refused" if is_named and len(outcome.error.splitlines()) <= 2 else "traceback"
    if outcome.digest == expected:
        return "mended" if "damaged" in outcome.said else "harmless"
    return "wrong" if kind.guarded else "unnoticeable"


def survey(material: Path, cases: int, seed: int, names: list[str] | None = None) -> tuple[Counter, list[str]]:
    """How many cases of each kind came out in which way, and what those that must not be were."""
    draw, counts, bad = random.Random(seed), Counter(), []
    kinds = [name for name in names or KINDS if any(material.glob(KINDS[name].pattern))]
    known: dict[Callable, str] = {}
    for number in range(cases):
        name = kinds[number % len(kinds)]
        command = draw.choice(KINDS[name].commands)
        with copied(material) as directory:
            path = draw.choice(sorted(path for path in directory.glob(KINDS[name].pattern) if path.stat().st_size))
            how = damage_file(path, draw)
            outcome = run(command, directory)
        if outcome.error is None and command not in known:
            with copied(material) as undamaged:
                expected = run(command, undamaged)
            assert expected.error is None, expected.error
            known[command] = expected.digest
        result = classify(KINDS[name], path, outcome, known.get(command))
        counts[name, result] += 1
        if result in ("wrong", "traceback"):
            called = getattr(command, "__qualname__", "")
            bad.append(f"{name}: {path.relative_to(directory)}, {how}, {called}: {result}\n{outcome.error}")
    return counts, bad


def table(counts: Counter) -> str:
    lines = ["".join(["".ljust(26), *(result.rjust(14) for result in RESULTS)])]
    for name in dict.fromkeys(name for name, _ in counts):
        lines.append(name.ljust(26) + "".join(str(counts[name, result]).rjust(14) for result in RESULTS))
    totals = (str(sum(count for (_, found), count in counts.items() if found == result)) for result in RESULTS)
    return "\n".join([*lines, "all".ljust(26) + "".join(total.rjust(14) for total in totals)])


def main() -> None:
    import materials

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", help="names of kinds (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        materials.write_teacher(base / "teacher")
        materials.write_student(base / "student", tied=True)
        materials.write_alice_json(base / "alice")
        (base / "material").mkdir()
        make_material(base / "material", base / "teacher", base / "student", base / "alice")
        counts, bad = survey(base / "material", args.cases, args.seed, args.kinds)
        os.chdir("/")
    print("\n\n".join(bad))
    print(table(counts))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
