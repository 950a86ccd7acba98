"""`litgpt evaluate_akl`: what a student has taken on of its teacher, and how well it answers."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
from litgpt.args import TrainArgs
from litgpt.data import DataModule
from litgpt.model import GPT

from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.config.checks import check_hybrid_sharding, check_questions, count_devices, no_data
from litgpt_akl.config.recipe import check_masked, plain
from litgpt_akl.config.refusals import check_at_least_one
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import TokenizedDataset, turn_ends
from litgpt_akl.data.workers import end_with_parent
from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.manifest import EVALUATION
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.loss.objective import HeadRule
from litgpt_akl.messages import UserError, say
from litgpt_akl.models.generation import longest_prompt, stop_sequences
from litgpt_akl.models.gpt import Precision, frozen_precision, load_frozen
from litgpt_akl.models.pair import Pair, check_pair
from litgpt_akl.training.launch import ending_together, start
from litgpt_akl.training.logging import silence_known_noise
from litgpt_akl.training.out_dir import check_apart, is_final, out_dir_locked
from litgpt_akl.training.responses import Responses, ResponseSampler, as_lines, find_questions, rate
from litgpt_akl.training.run import choose_day
from litgpt_akl.training.summary import readable_perplexity
from litgpt_akl.training.task_accuracy import Tasks, summary, task_table
from litgpt_akl.training.validation import gap_closed, measure

ROWS = {
    "forward_kl": ("forward KL to the teacher, nats", ".4f"),
    "reverse_kl": ("reverse KL to the teacher, nats", ".4f"),
    "adaptive_kl": ("adaptive KL to the teacher, nats", ".4f"),
    "agreement": ("share with the teacher's top-1 id", ".1%"),
    "cross_entropy": ("cross-entropy of the responses, nats", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "gap_closed": ("share of the cross-entropy gap closed", ".1%"),
    "kl_closed": ("share of the forward KL gone", ".1%"),
    "accuracy": ("share of the responses' ids predicted", ".1%"),
    "calibration_error": ("expected calibration error", ".4f"),
    "rouge_l": ("ROUGE-L of answers", ".2f"),
    "rouge_l_std": ("  standard deviation over seeds", ".2f"),
    "distinct_2": ("distinct-2 of answers", ".3f"),
    "answer_tokens": ("tokens of an answer", ".1f"),
}
"""What is printed, and how."""


def table(found: dict[str, dict[str, float]]) -> str:
    """What was measured of each model, for people."""
    roles = [role for role in ("before", "student", "teacher") if role in found]
    lines = [f"{'':38}" + "".join(f"{role:>12}" for role in roles)]
    for name, (label, form) in ROWS.items():
        values = [found[role].get(name, math.nan) for role in roles]
        if not all(map(math.isnan, values)):
            cells = ["" if math.isnan(value) else f"{value:{form}}" for value in values]
            if name == "perplexity":
                cells = [cell and readable_perplexity(value) for cell, value in zip(cells, values, strict=True)]
            lines.append(f"{label:38}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def nan_as_null(value: Any) -> Any:
    """The same with null for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {name: nan_as_null(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


RESULTS, ANSWERS = "evaluation.json", "answers.jsonl"
"""In ``out_dir``."""
VERSIONS = ("litgpt-akl", "litgpt", "torch", "rouge-score")
SETTINGS = (
    *"checkpoint_dir teacher_checkpoint_dir before_checkpoint_dir split max_records max_seq_length".split(),
    *"mu head_rule generation tasks task_limit num_fewshot precision".split(),
)
"""Options that decide what is found, which is kept with them."""


@dataclass
class Evaluation:
    """One call of the command, checked, under the names of its signature; what was left out is chosen."""

    checkpoint_dir: Path
    teacher_checkpoint_dir: Path
    before_checkpoint_dir: Path | None
    out_dir: Path | None
    overwrite: bool
    data: DataModule | None
    split: Literal["validation", "training"]
    max_records: int | None
    batch_size: int
    max_seq_length: int | None
    mu: float
    head_rule: HeadRule
    generation: GenerationArgs
    tasks: str | None
    task_limit: int | None
    num_fewshot: int | None
    precision: Precision | None
    devices: int | str
    num_nodes: int
    hybrid_sharding: bool
    access_token: str | None

    def __post_init__(self) -> None:
        check_masked({"data": self.data})
        names = ("max_records", "batch_size", "max_seq_length", "task_limit")
        check_at_least_one(**{name: getattr(self, name) for name in names})
        try:
            self.loss = DistillationLoss(divergence="akl", kd_ratio=1.0, mu=self.mu, head_rule=self.head_rule)
        except ValueError as error:
            raise UserError(f"--{error}.") from None
        if self.tasks is None:
            for name in ("task_limit", "num_fewshot"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} {getattr(self, name)} has no effect without --tasks. Leave {name} out.")
            if self.data is None:
                raise UserError(no_data())
        if self.data is not None:
            check_questions(self.data, self.generation)
        self.devices = count_devices(self.devices, self.num_nodes)
        check_hybrid_sharding(self.hybrid_sharding, self.devices, self.num_nodes)
        self.questions = None if self.tasks is None else Tasks(self.tasks, self.task_limit, self.num_fewshot)
        self.precision, self.dtype = frozen_precision(self.precision)
        students = {"student": self.checkpoint_dir, "before": self.before_checkpoint_dir}
        options = {"before": "--before_checkpoint_dir"}
        self.pairs = {
            role: check_pair(
                directory, self.teacher_checkpoint_dir, self.access_token, student_option=options.get(role)
            )
            for role, directory in students.items()
            if directory is not None
        }
        """Each student with its teacher: ``student``, and ``before`` if it is given."""
        student_dir = self.pairs["student"].student_dir
        # another run may replace final/, but not what was found of it
        own_place = (student_dir.parent if is_final(student_dir) else student_dir) / EVALUATION
        self.out_dir = own_place if self.out_dir is None else Path(self.out_dir)
        if self.out_dir.resolve() != own_place.resolve():
            directories = {role: pair.student_dir for role, pair in self.pairs.items()}
            check_apart("--out_dir", self.out_dir, directories | {"teacher": self.pairs["student"].teacher_dir})

    @property
    def micro_batch(self) -> tuple[int, int | None]:
        """Records that the models read together, and if told, the tokens that count in their place."""
        return self.batch_size, getattr(self.data, "micro_batch_tokens", None)


def evaluate_akl(
    checkpoint_dir: Path,
    *,
    teacher_checkpoint_dir: Path,
    before_checkpoint_dir: Path | None = None,
    out_dir: Path | None = None,
    overwrite: bool = False,
    data: DataModule | None = None,
    split: Literal["validation", "training"] = "validation",
    max_records: int | None = None,
    batch_size: int = 8,
    max_seq_length: int | None = None,
    mu: float = 0.5,
    head_rule: HeadRule = "paper",
    generation: GenerationArgs = GenerationArgs(),
    tasks: str | None = None,
    task_limit: int | None = None,
    num_fewshot: int | None = None,
    precision: Precision | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    hybrid_sharding: bool = False,
    access_token: str | None = None,
) -> None:
    r"""Hold a student against its teacher: distributions and sampled answers on held-out records, and tasks of lm-eval.

    Example:
      litgpt evaluate_akl out/qwen3/final \
          --teacher_checkpoint_dir checkpoints/Qwen/Qwen3-8B \
          --before_checkpoint_dir checkpoints/Qwen/Qwen3-0.6B \
          --data StreamingSFT --data.path records.jsonl --data.mask_prompt true

    Arguments:
        checkpoint_dir: The student's checkpoint directory, such as ``final/`` of a run.
        teacher_checkpoint_dir: The teacher's; it must have the student's tokenizer.
        before_checkpoint_dir: The student's as it was before distillation: with it, the share of the gap to the teacher
            that was closed is told.
        out_dir: Where ``evaluation.json`` and all answers, ``answers.jsonl``, are written (default: ``evaluate_akl/``
            in the student's directory, or beside it if that is the ``final/`` of a run).
        overwrite: Whether those of an evaluation before may be replaced.
        data: A class of records and its options; those of training, so that prompts are the same.
        split: Which of the data's records to read.
        max_records: How many of them, from the first on (default: all).
        batch_size: Records that the models read together; with ``--data.micro_batch_tokens``, as many as have so many
            tokens. Changes speed and memory, not the results, up to rounding.
        max_seq_length: Tokens to which records are cut (default: the models' context; longer ones are refused).
        mu: Mass of the teacher's distribution that counts as its head, in adaptive KL.
        head_rule: Whether the id that crosses mu belongs to the head (paper), or not, as in the authors' code
            (official).
        generation: Arguments of the answers that are rated. See ``litgpt_akl.config.args.GenerationArgs`` for details.
        tasks: CSV of task names of lm-eval, or of YAML files of tasks, such as "arc_easy,piqa": the accuracy of all
            models is told with its standard error, and the share of the teacher's above chance that the student has.
            With them data may be left out.
        task_limit: How many questions of each task are asked, from the first on (default: all).
        num_fewshot: Solved examples before each question (default: as each task says).
        precision: What all models are held in and computed with (default: bf16-true on a GPU, 32-true on a CPU).
        devices: How many devices to use on each node. With more than one in all, the models are sharded.
        num_nodes: How many nodes the code is being run on.
        hybrid_sharding: Whether every node holds whole models, sharded over its own devices only.
        access_token: Optional API token to access models with restrictions.
    """
    silence_known_noise()
    start(main, Evaluation(**locals()))


@partial(ending_together, way_on="The others were ended; run the same command again.")
def main(fabric: L.Fabric, evaluation: Evaluation) -> None:
    """Evaluate in each process; the first one writes what was found."""
    if fabric.local_rank > 0:
        end_with_parent()
    with out_dir_locked(fabric, evaluation.out_dir):
        there = [name for name in (RESULTS, ANSWERS) if (evaluation.out_dir / name).exists()]
        if fabric.is_global_zero and there and not evaluation.overwrite:
            raise UserError(
                f"{evaluation.out_dir} has {' and '.join(there)} already.\nGive --overwrite true to replace what is"
                " there, or another --out_dir."
            )
        _evaluate(fabric, evaluation)


def _evaluate(fabric: L.Fabric, evaluation: Evaluation) -> None:
    if evaluation.questions is not None:
        with fabric.rank_zero_first():
            evaluation.questions.read()
    records = evaluation.data is not None
    dataset, numbers = _open_records(fabric, evaluation) if records else (None, range(0))
    sampler, left_out = _prepare_questions(fabric, evaluation, dataset, numbers) if records else (None, 0)
    found, responses, by_task = _read_and_ask(fabric, evaluation, dataset, numbers, sampler)
    if "before" in found:
        before, after, teacher = found["before"], found["student"], found["teacher"]
        after["gap_closed"] = gap_closed(*(of["cross_entropy"] for of in (before, after, teacher)))
        after["kl_closed"] = gap_closed(before["forward_kl"], after["forward_kl"], 0.0)
    if not fabric.is_global_zero:
        return
    counts = {"records": len(numbers), "prompts": 0 if sampler is None else len(sampler.questions)}
    counts |= {"prompts_left_out": left_out, "date": getattr(evaluation.data, "date", None)}
    content = found | {"data": counts, "settings": plain({name: getattr(evaluation, name) for name in SETTINGS})}
    if by_task:
        chance = evaluation.questions.chance
        content["tasks"] = {"metrics": by_task, "chance": chance, "mean": summary(by_task, chance)}
    content["versions"] = {name: version(name) for name in VERSIONS + (("lm-eval",) if by_task else ())}
    with explain_failure(evaluation.out_dir):
        write_file(evaluation.out_dir / RESULTS, json.dumps(nan_as_null(content), indent=1).encode())
        # those of an evaluation before are not of this one
        (evaluation.out_dir / ANSWERS).unlink(missing_ok=True)
        if sampler is not None:
            write_file(evaluation.out_dir / ANSWERS, as_lines(sampler.questions, responses).encode())
    if found:
        print(f"\n{counts['records']:,} records, {counts['prompts']:,} prompts; means over response tokens\n")
        print(table(found))
    if by_task:
        print("\nTasks: value ± standard error; kept is the share of the teacher's accuracy above chance\n")
        print(task_table(by_task, evaluation.questions.chance))
    say(f"\nWritten to {evaluation.out_dir}")


def _open_records(fabric: L.Fabric, evaluation: Evaluation) -> tuple[TokenizedDataset, range]:
    """The store of the records that are evaluated, and their numbers in it."""
    pair = evaluation.pairs["student"]
    train = TrainArgs(micro_batch_size=evaluation.batch_size, max_seq_length=evaluation.max_seq_length)
    students = [each.student_dir for each in evaluation.pairs.values()]
    day = fabric.broadcast(choose_day(students) if fabric.is_global_zero else None)
    with fabric.rank_zero_first():
        options = train, pair.context_length, pair.student_dir, "--max_seq_length"
        known = {"date": day.date, "teacher_dir": pair.teacher_dir, "vocab_size": pair.vocab_size}
        splits = prepare_datasets(evaluation.data, pair.tokenizer, *options, **known)
    if getattr(evaluation.data, "date", None):
        fabric.print(day)
    pair.check_unchanged("student")
    dataset = splits[evaluation.split == "validation"]
    numbers = range(len(dataset))[: evaluation.max_records]
    if not numbers:
        raise UserError(
            f"--split {evaluation.split}: the data has no such records. Hold some out by the data's own options, or"
            " evaluate all of a file of test records with --split training."
        )
    return dataset, numbers


def _prepare_questions(
    fabric: L.Fabric, evaluation: Evaluation, dataset: TokenizedDataset, numbers: Sequence[int]
) -> tuple[ResponseSampler | None, int]:
    """What draws responses, None if none are wanted; and how many prompts are left out since a model cannot read them.

    Raises UserError if no prompt is left, or a sample has none.
    """
    args, pair = evaluation.generation, evaluation.pairs["student"]
    if not args.seeds:
        return None, 0
    prompt_style = getattr(evaluation.data, "prompt_style", None)
    stop = stop_sequences(pair.tokenizer, prompt_style, turn_ends(dataset, pair.tokenizer.special_ids))
    found = find_questions(dataset, numbers, pair.tokenizer, stop)
    configs = [each.student_config for each in evaluation.pairs.values()]
    configs += [pair.teacher_config] if args.teacher else []
    config = min(configs, key=longest_prompt)
    questions = [question for question in found if len(question.prompt) <= longest_prompt(config)]
    left_out = len(found) - len(questions)
    if left_out:
        why = f"longer than the {longest_prompt(config):,} tokens that {config.name} can answer"
        if not questions:
            raise UserError(
                f"All of {len(found):,} prompts are {why}.\n"
                "Evaluate records with shorter ones, or leave answers out with --generation.seeds '[]'."
            )
        fabric.print(f"{left_out:,} of {len(found):,} prompts are left out of the answers: they are {why}")
    options = pair.tokenizer, stop, pair.vocab_size, args, evaluation.micro_batch[1]
    return ResponseSampler(fabric, questions[: args.max_prompts], *options), left_out


def _read_and_ask(
    fabric: L.Fabric,
    evaluation: Evaluation,
    dataset: TokenizedDataset | None,
    numbers: Sequence[int],
    sampler: ResponseSampler | None,
) -> tuple[dict[str, dict[str, float]], dict[str, list[Responses]], dict[str, dict[str, dict[str, float]]]]:
    """What is measured of each model, its responses, and its metrics by task; one student at a time is in memory."""
    found: dict[str, dict[str, float]] = {}
    responses: dict[str, list[Responses]] = {}
    by_task: dict[str, dict[str, dict[str, float]]] = {}

    def ask(role: str, model: GPT, pair: Pair, answers: bool = True) -> None:
        if sampler is not None and answers:
            responses[role] = sampler.sample(model, role)
            found[role] |= rate(sampler.questions, responses[role])
        if evaluation.questions is not None:
            options = pair.tokenizer, pair.vocab_size, evaluation.batch_size, role
            by_task[role] = evaluation.questions.measure(fabric, model, *options)

    pair = evaluation.pairs["student"]
    options = {"micro_batch": evaluation.micro_batch, "vocab_size": pair.vocab_size}
    teacher = load_frozen(fabric, pair.teacher_dir, pair.teacher_config, evaluation.dtype)
    pair.check_unchanged("teacher")
    for role, pair in evaluation.pairs.items():
        student = load_frozen(fabric, pair.student_dir, pair.student_config, evaluation.dtype)
        pair.check_unchanged("student")
        if dataset is not None:
            measures = measure(fabric, student, teacher, evaluation.loss, dataset, numbers, name=role, **options)
            found |= {role: measures.student, "teacher": found.get("teacher", measures.teacher)}
        ask(role, student, pair)
        del student
    ask("teacher", teacher, evaluation.pairs["student"], evaluation.generation.teacher)
    return found, responses, by_task
