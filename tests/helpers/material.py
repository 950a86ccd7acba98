"""Files of every kind that a command reads or writes, and the commands that do."""

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import torch
import zstandard
from litgpt.data import JSON, LitData
from litgpt.prompts import Default, save_prompt_style

from helpers.drawing import pages
from helpers.runs import distil
from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.commands.report_akl import report_akl
from litgpt_akl.config.args import GenerationArgs, LoRAArgs, TeacherArgs
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.files.examples import read_examples
from litgpt_akl.files.lock import LOCK
from litgpt_akl.models.export import write_export
from litgpt_akl.report.history import read_history

Command = Callable[[Path], None]
"""Works in a directory with all material, and writes into the one that it is given."""
ADAPTERS = LoRAArgs(r=2)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FORMATS = ("json", "jsonl", "jsonl.gz", "json.zst", "parquet")
"""Of the chats."""


def records() -> JSON:
    return JSON(json_path=Path("data"), mask_prompt=True, prompt_style=Default(), num_workers=0)


def train(out: Path, data=None, teacher: str = "teacher", **changes) -> None:
    """One step from the student, without a look at the validation data, and without a page in the default set."""
    shows = changes.get("eval") is SHOWING
    quiet = {"initial_validation": False, "final_validation": False} | changes.pop("eval", {})
    steps = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2} | changes.pop("train", {})
    with pages(drawn=shows):
        distil(Path("student"), Path(teacher), data or records(), out, train=steps, eval=quiet, **changes)


def train_by_hf(out: Path) -> None:
    """With a teacher in Hugging Face's format."""
    train(out, teacher="hf")


def chats(ending: str = "jsonl") -> StreamingSFT:
    path = f"data/chat.{ending}"
    return StreamingSFT(path=path, val_split_fraction=0.0, cache_dir=Path("prepared"), num_workers=0, num_proc=1)


def train_on_chats(out: Path) -> None:
    """With the student's own chat template and prompt style."""
    train(out, chats())


def train_on(ending: str) -> Command:
    def train_on_format(out: Path) -> None:
        train(out, chats(ending))

    return train_on_format


def train_on_chunks(out: Path) -> None:
    train(out, LitData("chunks", num_workers=0), train={"max_seq_length": 32})


SAVING = {"max_steps": 3, "save_interval": 1}
SHOWING = {"interval": 2, "max_iters": 1, "max_new_tokens": 2, "initial_validation": True, "final_validation": True}


def train_and_save(out: Path) -> None:
    """All that a run writes: checkpoints, validations, examples and pages, also for Transformers."""
    train(out, chats(), train=SAVING, eval=SHOWING, export_hf=True)


def train_adapters(out: Path) -> None:
    train(out, train=SAVING, lora=ADAPTERS)


def train_cached(out: Path) -> None:
    distil_cached(out, "auto")


def read_cache(out: Path) -> None:
    distil_cached(out, "read")


def fill(out: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        distil_cached(out, "fill")
    # what it has is what a run makes of it
    read_cache(out)


def start_cache(out: Path) -> None:
    """With a cache that is not there yet."""
    distil_cached(out, "auto", "new-cache")


def distil_cached(out: Path, mode: str, directory: str = "cache") -> None:
    options = TeacherArgs(cache_dir=directory, cache_mode=mode)
    quiet = {"initial_validation": False, "final_validation": False}
    steps = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    with pages(drawn=False):
        distil(Path("student"), Path("teacher"), records(), out, train=steps, eval=quiet, teacher=options)


def resume(run: str, **changes) -> Command:
    def go_on(out: Path) -> None:
        Path(run, "step-000001").rename(out / "step-000001")
        train(out, resume=True, train={"max_steps": 2}, **changes)
        shutil.rmtree(out / "step-000001", ignore_errors=True)

    return go_on


RESUME = resume("run")


def resume_in_place(out: Path) -> None:
    """With all else that an interrupted run has left."""
    for path in Path("stopped").iterdir():
        # what is in the way stays there
        if not (out / path.name).exists():
            path.rename(out / path.name)
    train(out, resume=True, train={"max_steps": 2}, eval=SHOWING)
    shutil.rmtree(out / "step-000001", ignore_errors=True)


def evaluate(out: Path) -> None:
    options = {"max_records": 2, "generation": GenerationArgs(seeds=[])}
    evaluate_akl(Path("student"), teacher_checkpoint_dir=Path("teacher"), data=records(), out_dir=out, **options)


def report(out: Path) -> None:
    report_akl([Path("run")], out=out / "report.html")
    # the page itself holds random names
    (out / "shown").write_text(repr((read_history(Path("run")), read_examples(Path("run")))))


def halve(directory: str) -> Command:
    return lambda out: make_student(Path(directory), out / "made", layers=1)


def export(directory: str) -> Command:
    return lambda out: export_hf(Path(directory), out / "exported")


class Kind(NamedTuple):
    """Files that are read in one way."""

    pattern: str
    """From the directory with all material."""
    commands: tuple[Command, ...]
    """Those that read it; quick ones more than once, which are then taken more often."""
    guarded: bool
    """Whether something says what was right: then nothing that was changed may be taken for good."""
    before: Command | None = None
    """What makes the files, if they hold only where they were made."""


QUICK = (export("student"),) * 4 + (halve("student"),) * 3
OF_STUDENT = (*QUICK, train, evaluate)
KINDS = {
    "weights": Kind("student/lit_model.pth", OF_STUDENT, True),
    "teacher's weights": Kind("teacher/lit_model.pth", (halve("teacher"), export("teacher"), train, evaluate), True),
    "model_config.yaml": Kind("student/model_config.yaml", OF_STUDENT, False),
    "teacher's config": Kind("teacher/*config*", (train, evaluate, halve("teacher")), False),
    "teacher's tokenizer": Kind("teacher/tokenizer*", (train, evaluate, halve("teacher")), False),
    "config.json": Kind("student/config.json", OF_STUDENT, False),
    "generation_config.json": Kind("student/generation_config.json", OF_STUDENT, False),
    "tokenizer.json": Kind("student/tokenizer.json", OF_STUDENT, False),
    "tokenizer_config.json": Kind("student/tokenizer_config.json", OF_STUDENT, False),
    "prompt_style.yaml": Kind("student/prompt_style.yaml", (*QUICK, train_on_chats), False),
    "chat_template.jinja": Kind("student/chat_template.jinja", (train_on_chats,), False),
    "safetensors": Kind("hf/*.safetensors", (train_by_hf,), False),
    "safetensors index": Kind("hf/*.index.json", (train_by_hf,), False),
    "checkpoint to resume": Kind("run/step-000001/*", (RESUME,), True),
    "manifest": Kind("run/step-000001/manifest.json", (RESUME,), True),
    "training_state.pth": Kind("run/step-000001/training_state.pth", (RESUME,), True),
    "LoRA checkpoint": Kind("lora/step-000001/*", (resume("lora", lora=ADAPTERS),), True),
    "checkpoint as a model": Kind("run/step-000001/*", (export("run/step-000001"), halve("run/step-000001")), True),
    "trained student": Kind("run/final/*", (export("run/final"), halve("run/final")), True),
    "cache: chunks": Kind("cache/training/*", (train_cached, read_cache, fill), True),
    "cache: LM head": Kind("cache/head-*", (train_cached, read_cache), True),
    "cache: identity": Kind("cache/cache.json", (train_cached, read_cache), False),
    "records": Kind("data/*.json", (train,), False),
    **{f"chats: {ending}": Kind(f"data/chat.{ending}", (train_on(ending),), False) for ending in FORMATS},
    "prepared chats": Kind("prepared/**/*.*", (train_on_chats,), True, before=train_on_chats),
    "prepared records": Kind("datasets/**/*.*", (train,), True, before=train),
    "run to resume": Kind("stopped/*.*", (resume_in_place,), True),
    "metrics to resume": Kind("stopped/logs/csv/*/*", (resume_in_place,), True),
    "lock": Kind(f"stopped/{LOCK}", (resume_in_place,), True),
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
    write_chats(base / "data", records)
    os.chdir(base)
    write_export(Path("teacher"), Path("hf"), max_shard_size="1MB")
    shutil.copyfile("teacher/model_config.yaml", "hf/model_config.yaml")
    shown = {"initial_validation": True, "max_iters": 1, "max_new_tokens": 2}
    train(Path("run"), train={"max_steps": 2, "save_interval": 1}, eval=shown)
    train(Path("lora"), train={"max_steps": 2, "save_interval": 1}, lora=ADAPTERS)
    stop(Path(shutil.copytree("run", "stopped")))
    with contextlib.suppress(FileNotFoundError):
        distil_cached(Path("unused"), "fill")
    with contextlib.suppress(ImportError):
        write_chunks(Path("chunks"))


def stop(run: Path) -> None:
    """Make a finished run one that was killed after its first step."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "step-000002")
    process = {"process": 1, "machine": "gone", "since": "yesterday", "process_began": 0.0}
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (run / LOCK).write_text(json.dumps(process | {"boot": boot, "process_ids": ""}))


def write_chats(directory: Path, records: list[dict[str, str]]) -> None:
    """The same chats in all of ``FORMATS``."""
    found = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in records
    ]
    lines = "".join(json.dumps(chat) + "\n" for chat in found).encode()
    (directory / "chat.json").write_text(json.dumps(found))
    (directory / "chat.jsonl").write_bytes(lines)
    (directory / "chat.jsonl.gz").write_bytes(gzip.compress(lines))
    (directory / "chat.json.zst").write_bytes(zstandard.compress(json.dumps(found).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), directory / "chat.parquet")


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
