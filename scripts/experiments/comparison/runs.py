"""One training, and one test of its student, by the commands themselves."""

import csv
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON

from comparison.material import Material
from comparison.methods import Settings
from comparison.store import Run, Store
from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import GenerationArgs, TeacherArgs
from litgpt_akl.config.distillation import DistillArgs, MixArgs, ScheduleArgs
from litgpt_akl.messages import UserError

NEVER = 10**9

TEST_BATCH = 8
"""Records that are read together."""

DECODING_SEEDS = [10]
"""One answer a prompt: more prompts tell more than more answers to each."""


@dataclass(frozen=True)
class Place:
    """What runs share."""

    settings: Settings
    material: Material
    cache: Path
    """The teacher's hidden states."""
    store: Store

    @property
    def filled(self) -> Path:
        """A file that is there when the cache has all records."""
        settings = self.settings
        return self.cache / f".filled-{settings.train_records}-{settings.validation_records}"


def fill(place: Place) -> None:
    """Let the teacher read all records for training and validation, once for all runs."""
    with tempfile.TemporaryDirectory() as out_dir:
        distil(place, place.material.students[place.settings.seeds[0]], Path(out_dir), cache_mode="fill")
    place.filled.touch()


def train(place: Place, run: Run) -> None:
    """Train; leave the student and what the run's own log says.

    The result is ``validation``, the last validation's numbers, ``h``, the mean over all training tokens, ``tokens``,
    of responses, and ``seconds``; or only ``failed``, where a loss or a gradient was not finite.
    """
    directory, began = place.store.directory(run), time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    out_dir = directory / "run"
    student = place.material.students[run.seed]
    try:
        distil(place, student, out_dir, run.rate, run.seed, dict(run.options))
    except UserError as error:
        if not any(out_dir.glob("nonfinite-step-*.json")):
            raise
        place.store.write_training(run, {"failed": str(error).splitlines()[0]})
        return
    rows = logged(out_dir)
    (out_dir / "final").rename(place.store.student(run))
    shutil.rmtree(out_dir)
    steps = [row for row in rows if "h" in row]
    tokens = [row["response_tokens_per_second"] * row["seconds_per_step"] for row in steps]
    validation = {name.removeprefix("val_"): value for name, value in rows[-1].items() if name.startswith("val_")}
    place.store.write_training(
        run,
        {
            "validation": validation,
            "h": sum(row["h"] * count for row, count in zip(steps, tokens, strict=True)) / sum(tokens),
            "tokens": round(sum(tokens)),
            "seconds": time.monotonic() - began,
        },
    )


def test(place: Place, run: Run) -> None:
    """Test the student of a run on records that it has not seen, by `litgpt evaluate_akl`."""
    settings, began = place.settings, time.monotonic()
    with tempfile.TemporaryDirectory() as out_dir:
        evaluate_akl(
            place.store.student(run),
            teacher_checkpoint_dir=place.material.teacher,
            out_dir=Path(out_dir),
            data=records(place, place.material.test),
            batch_size=TEST_BATCH,
            max_seq_length=place.material.max_seq_length,
            generation=GenerationArgs(
                seeds=DECODING_SEEDS, max_new_tokens=settings.new_tokens, max_prompts=settings.prompts, teacher=False
            ),
            precision="32-true",
        )
        found = json.loads((Path(out_dir) / "evaluation.json").read_text(encoding="utf-8"))
    place.store.write_test(run, found["student"] | {"seconds": time.monotonic() - began})


def call_of(kind: Literal["fill", "train", "test"], place: Place, run: Run | None) -> tuple[Callable, tuple]:
    """The function that does such a piece of work, and its arguments."""
    function = {"fill": fill, "train": train, "test": test}[kind]
    return function, (place,) if run is None else (place, run)


def records(place: Place, directory: Path) -> JSON:
    """The data module of a directory of the material."""
    return JSON(directory, mask_prompt=True, prompt_style=place.material.prompt_style, num_workers=0)


def objective(options: dict[str, str | float]) -> DistillArgs:
    """The objective of a method."""
    options = {**options}
    groups = {"mix": MixArgs(options.pop("mix_ratio"))} if "mix_ratio" in options else {}
    if "mix_from" in options:
        groups["schedule"] = ScheduleArgs(mix_ratio=(options.pop("mix_from"), options.pop("mix_to")))
    return DistillArgs(**options, **groups)


def distil(
    place: Place,
    student: Path,
    out_dir: Path,
    rate: float = 1.0,
    seed: int = 0,
    options: dict[str, str | float] | None = None,
    cache_mode: Literal["fill", "read"] = "read",
) -> None:
    """`litgpt finetune_akl` with what is the same for all runs."""
    settings, material = place.settings, place.material
    batch, validations = settings.batch, -(-settings.validation_records // settings.batch)
    setup(
        student,
        teacher_checkpoint_dir=material.teacher,
        out_dir=out_dir,
        precision="32-true",
        data=records(place, material.data),
        teacher=TeacherArgs(cache_dir=str(place.cache), cache_mode=cache_mode),
        distill=objective(options or {}),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=batch,
            micro_batch_size=batch,
            lr_warmup_steps=None,
            epochs=None,
            max_steps=settings.steps,
            max_seq_length=material.max_seq_length,
            max_norm=1.0,
            min_lr=0.0,
        ),
        eval=EvalArgs(interval=NEVER, max_iters=validations, max_new_tokens=None, initial_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "weight_decay": 0.01}},
        seed=seed,
    )


def logged(out_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's log, each without its empty cells."""
    log = next((out_dir / "logs" / "csv").glob("version_*/metrics.csv"))
    with log.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
