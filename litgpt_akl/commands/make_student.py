"""`litgpt make_student`: a student made from some of its teacher's layers."""

import shlex
import shutil
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from io import TextIOBase
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule

from litgpt_akl.commands import finetune_akl
from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.files.directories import write_directory
from litgpt_akl.files.lock import new_directory_locked
from litgpt_akl.files.table import read_table
from litgpt_akl.messages import UserError, say
from litgpt_akl.models.model_size import measure_size
from litgpt_akl.models.student_checkpoint import TeacherFiles
from litgpt_akl.models.student_config import student_sizes
from litgpt_akl.models.vocabulary import describe_padding
from litgpt_akl.training.budget import StudentCosts, count_layers, find_budget
from litgpt_akl.training.logging import silence_known_noise
from litgpt_akl.training.student_choice import HELD_OUT, Choice, choose, choose_candidate, plan_candidates
from litgpt_akl.training.student_making import Method, StudentMaking

MOST = 0.75
"""Share of the teacher's parameters above which a student is near its teacher, and trained at a lower rate."""


def make_student(
    teacher_dir: Path,
    out_dir: Path,
    *,
    layers: int | list[int] | None = None,
    params: float | None = None,
    memory: str | None = None,
    speed: float | None = None,
    width: float | None = None,
    mlp: float | None = None,
    heads: float | None = None,
    experts: float | None = None,
    candidates: int | None = None,
    trial_steps: int | None = None,
    data: DataModule | None = None,
    method: Method | None = None,
    keep_ends: bool = True,
    records: int | None = None,
    kl_records: int | None = None,
    scores: Path | None = None,
    max_seq_length: int | None = None,
    precision: Literal["32-true", "bf16-true"] | None = None,
) -> None:
    r"""Make a student of some of a teacher's layers, channels and heads, for teachers that have no smaller sibling.

    The student keeps the teacher's tokenizer and chat template, and the weights of all that it has. It is a complete
    LitGPT checkpoint, to be trained by distillation: untrained it is a much worse model than its teacher. With
    ``--data`` it keeps what matters most on these records; without, evenly spread layers, a far worse start.

    Example, of 15 layers that are chosen, or of four that are named:
      litgpt make_student checkpoints/big checkpoints/small --layers 15 \
          --data StreamingSFT --data.path train.jsonl
      litgpt make_student checkpoints/big checkpoints/small --layers '[0,2,5,8]'

    Args:
        teacher_dir: The teacher's LitGPT checkpoint directory.
        out_dir: The student's checkpoint directory. It must not exist yet, or be empty.
        layers: How many layers to keep, or the numbers of the layers to keep, rising from 0: ``'[0,2,5,8]'``.
        params: In place of ``layers``, how many of the teacher's parameters to keep at most: up to 1 a share, such as
            0.5, above 1 a number, such as 3.6e8.
        memory: In place of it, what the student's weights take at most, in the type of the teacher's: such as 500MB or
            2GiB.
        speed: In place of it, how many times the teacher's tokens of one answer the student is to write in a second,
            such as 1.5. Both are timed on this device, in ``precision``, with LitGPT's key-value cache.
        width: How many channels of the hidden states to keep, or up to 1 the share of them. A share gives a multiple of
            64, or of 8 below 512. Embeddings, too, have fewer numbers then.
        mlp: The same of the channels within each MLP, or each expert.
        heads: The same of the query heads in each layer. Groups that share keys and values all keep as many.
        experts: The same of the experts in each layer.
        candidates: How many students of ``params``, ``memory`` or ``speed`` are compared: of fewer layers, narrower
            ones, and of some of both. That with the lowest forward KL to the teacher on validation records is made.
        trial_steps: Optimizer steps of 8 records after which the three best candidates are compared again (default: 50;
            0 compares as they are). The student that is made has none of that training.
        data: Calibration records: data-related arguments as of finetune_akl. Those of the training to come are best.
        method: How layers are chosen. ``greedy`` (the default with data) removes one layer at a time, that without
            which the forward KL to the teacher is lowest. ``block_influence``, quicker and the worse the more layers
            go, removes those that turn their input least. ``even`` (the default without data) spreads them evenly from
            the first to the last.
        keep_ends: Whether the teacher's first and last layer stay in any case, when layers are chosen by data.
        records: Calibration records to score the teacher's parts by, evenly spread over the training records (default:
            256).
        kl_records: How many of these measure the forward KL (default: 10).
        scores: A file in which the scores of the teacher's parts are kept, and found again: another student of the same
            teacher and records then takes seconds. It need not be there yet.
        max_seq_length: Tokens to which calibration records are cut (default: the teacher's context; longer ones are
            refused).
        precision: What the teacher is computed with on calibration records (default: bf16-true on a GPU, 32-true on a
            CPU). The student's weights have the type of the teacher's.
    """
    silence_known_noise()
    making = StudentMaking(**locals())
    teacher, out_dir = TeacherFiles.open(making.teacher_dir), making.out_dir
    sizes = student_sizes(teacher.config, making.narrower, teacher.kind)
    costs = StudentCosts(making, teacher)
    budget = find_budget(making, costs)
    if making.candidates:
        candidates = plan_candidates(making, teacher, costs, budget)
    else:
        layers = count_layers(making, teacher, sizes, budget)
    with new_directory_locked(out_dir), write_directory(out_dir) as student_dir:
        if making.candidates:
            train = partial(_train_briefly, making, teacher, student_dir.parent / "trials")
            choice = choose_candidate(making, teacher, candidates, costs, train)
        else:
            choice = choose(making, teacher, layers, sizes)
        teacher.write_student(student_dir, out_dir, *choice)
    _tell(teacher, out_dir, choice)


def _tell(teacher: TeacherFiles, out_dir: Path, choice: Choice) -> None:
    """Say what was made of a teacher."""
    kept, config = choice.kept, teacher.config
    size = teacher.size_of(kept.layers, choice.sizes).whole / 1e6
    whole = measure_size(config, teacher.tied).whole / 1e6
    say(
        f"{out_dir}: a student with {len(kept.layers)} of the {config.n_layer} layers of {teacher.directory} "
        f"({', '.join(map(str, kept.layers))}), {size:.1f} M of its {whole:.1f} M parameters."
    )
    if padding := describe_padding(config, teacher.ids):
        say(f"{padding} The student has none of them.")
    words = ["litgpt", "finetune_akl", out_dir, "--teacher_checkpoint_dir", teacher.directory]
    rate = "3e-4" if size > MOST * whole else "1e-3"
    say(f"Next: {shlex.join(map(str, words))} --optimizer.lr {rate}, with --data of the training.")


class _StepsOnly(TextIOBase):
    """Hands on the lines that say how far a training is, and no others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text.startswith("step "):
            self._stream.write(f"{text}\n")
            self._stream.flush()
        return len(text)


BATCH = {"global_batch_size": 8, "micro_batch_size": 4}
"""Records of a step and of a micro-batch, of candidates that are trained for a few steps."""


def _train_briefly(making: StudentMaking, teacher: TeacherFiles, work_dir: Path, choice: Choice) -> float:
    """The forward KL on validation records of a student that was trained for a few steps, of which nothing is kept.

    All that are trained within ``work_dir`` read the teacher's hidden states from one cache.
    """
    # LitGPT reads rules from a folder's name
    student_dir, run_dir = work_dir / "student" / making.out_dir.name, work_dir / "run"
    for directory in (student_dir, run_dir):
        shutil.rmtree(directory, ignore_errors=True)
    student_dir.mkdir(parents=True)
    teacher.write_student(student_dir, making.out_dir, *choice)
    steps = making.trial_steps
    train = TrainArgs(
        **BATCH,
        save_interval=None,
        log_interval=1,
        lr_warmup_steps=None,
        epochs=None,
        max_steps=steps,
        max_norm=1.0,
        min_lr=0.0,
        max_seq_length=making.max_seq_length,
    )
    # LitGPT's iterations are micro-batches
    iterations = HELD_OUT // BATCH["micro_batch_size"]
    try:
        with redirect_stdout(_StepsOnly(sys.stdout)):
            finetune_akl.setup(
                student_dir,
                teacher_checkpoint_dir=making.teacher_dir,
                data=deepcopy(making.data),
                optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}},
                out_dir=run_dir,
                save_minutes=None,
                teacher=TeacherArgs(cache_dir=str(work_dir / "cache")),
                # labels would pull the student away from the teacher, to which the distance is measured
                distill=DistillArgs(divergence="fkl", kd_ratio=1.0),
                train=train,
                eval=EvalArgs(interval=steps + 1, max_iters=iterations, max_new_tokens=None),
            )
    except UserError as error:
        raise UserError(
            f"A candidate cannot be trained for a few steps: {' '.join(str(error).splitlines())}\n"
            "Give --trial_steps 0 to compare candidates without training."
        ) from error
    except SystemExit:
        say(f"Stopped. Nothing is in {making.out_dir}.")
        raise
    columns, _ = read_table(next(run_dir.rglob("metrics.csv")))
    return columns["val_forward_kl"][~np.isnan(columns["val_forward_kl"])][-1].item()
