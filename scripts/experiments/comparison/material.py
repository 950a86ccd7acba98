"""The pairs of models and their records; what is there already is left alone."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import materials
import prepare_demo
from litgpt.data import JSON
from litgpt.prompts import Default, PromptStyle, SmolLM2

from comparison.methods import Settings
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.files.directories import write_directory

SHARES = {"smollm2": None, "smollm2-80": 0.8, "smollm2-60": 0.6}
"""Of SmolLM2's parameters, that a pair's student keeps in chosen layers."""


@dataclass(frozen=True)
class Material:
    """Where a pair lies."""

    teacher: Path
    students: dict[int, Path]
    """Untrained, for each training seed."""
    data: Path
    """Directory of ``train.json`` and ``val.json``, for ``litgpt.data.JSON``."""
    test: Path
    """The same with held-out records in ``val.json``."""
    prompt_style: PromptStyle
    max_seq_length: int


def prepare(settings: Settings, out: Path, demo: Path) -> Material:
    """Make or find the material of ``settings.pair``.

    Args:
        settings: the comparison.
        out: where it is made.
        demo: the demo's material, which smollm2 needs.
    """
    if settings.pair == "glassllm":
        return prepare_glassllm(settings, out)
    return prepare_smollm2(settings, out, demo)


def prepare_glassllm(settings: Settings, out: Path) -> Material:
    """A 4-layer English model, which has read the book, into random 2-layer students, one a seed; passages of it."""
    teacher = out / "teacher"
    students = {seed: out / f"student-{seed}" for seed in settings.seeds}
    if not teacher.is_dir():
        with write_directory(teacher) as directory:
            directory.rmdir()
            materials.write_teacher(directory)
    for seed, student in students.items():
        if not student.is_dir():
            with write_directory(student) as directory:
                directory.rmdir()
                materials.write_student(directory, tied=True, seed=seed)
    passages = materials.alice_passages()
    random.Random(0).shuffle(passages)
    held_out = settings.validation_records + settings.test_records
    data, test = write_records(settings, out, passages[held_out:], passages[:held_out])
    return Material(teacher, students, data, test, Default(), max_seq_length=128)


def prepare_smollm2(settings: Settings, out: Path, demo: Path) -> Material:
    """SmolLM2-135M-Instruct (Q4_1 release) into a student of its layers, the same for all seeds; PIQA.

    The student is 15 evenly spread layers, or has a share of the parameters, in layers that are chosen on the records.
    """
    prepare_demo.prepare_demo(demo)
    teacher, student = demo / prepare_demo.MODEL_NAME, out / "student"
    train, held_out = (json.loads((demo / "piqa" / f"{name}.json").read_text()) for name in ("train", "val"))
    data, test = write_records(settings, out, train, held_out)
    if not student.is_dir():
        options = {"layers": 15}
        if (share := SHARES[settings.pair]) is not None:
            records = JSON(data, mask_prompt=True, prompt_style=SmolLM2(), num_workers=0)
            options = {"params": share, "data": records, "records": 128}
        make_student(teacher, student, **options)
    return Material(teacher, dict.fromkeys(settings.seeds, student), data, test, SmolLM2(), max_seq_length=256)


def write_records(settings: Settings, out: Path, train: list[dict], held_out: list[dict]) -> tuple[Path, Path]:
    """The directories for training and for the test.

    Raises:
        SystemExit: there are fewer records than are asked for.
    """
    counts = settings.train_records, settings.validation_records, settings.test_records
    if counts[0] > len(train) or counts[1] + counts[2] > len(held_out):
        raise SystemExit(f"{settings.pair} has {len(train)} records for training and {len(held_out)} for the rest.")
    train, validation, test = train[: counts[0]], held_out[: counts[1]], held_out[counts[1] : counts[1] + counts[2]]
    name = "-".join(map(str, counts))
    directories = out / f"records-{name}", out / f"test-{name}"
    for directory, records in zip(directories, (validation, test), strict=True):
        if not directory.is_dir():
            with write_directory(directory) as partial:
                materials.write_json(partial / "train.json", train)
                materials.write_json(partial / "val.json", records)
    return directories
