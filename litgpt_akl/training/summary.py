"""What a run says of itself: first what it is and what to doubt, at last what has changed and how to go on."""

import csv
import inspect
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from litgpt.prompts import Default, PromptStyle, prompt_styles
from torch import nn

from litgpt_akl.config.recipe import plain
from litgpt_akl.config.teachers import shares
from litgpt_akl.data.streaming import own_prompt_style
from litgpt_akl.files.manifest import FINAL, FINAL_HF, PAGE
from litgpt_akl.loss.objective import OPTIONS
from litgpt_akl.memory.fit import report_memory
from litgpt_akl.messages import entry, shown
from litgpt_akl.models.chat_template import ChatTemplate
from litgpt_akl.models.prompt_format import PROBES, READ_BY_TRANSFORMERS, same_ids
from litgpt_akl.models.vocabulary import count_ids, describe_padding
from litgpt_akl.training.optimizer import make_optimizer
from litgpt_akl.training.run import Run, Splits, describe_steps, warmup_steps
from litgpt_akl.training.sample_text import describe_mask, first_sample
from litgpt_akl.training.teachers import runs_of_teachers


def announce(run: Run, splits: Splits, *, day: str, on_policy: str, cache: str, notes: list[str]) -> None:
    """Print a few lines on what is about to happen, in process 0 before any weight is read.

    Raises UserError if it takes more memory than there is.

    Args:
        run: with its first sample.
        splits: its samples.
        day: that its prompts have in them, in words; empty if they have none.
        on_policy: what the student answers itself, in words; empty if nothing.
        cache: what the teacher cache holds and takes, in words; empty if there is none.
        notes: what a user is to know of models and prompts.
    """
    trains = run.teacher.cache_mode != "fill"
    teachers = "; ".join(f"teacher {_model(part, 'teacher')}" for part in runs_of_teachers(run))
    entry("Pair", _pair(run) if trains else teachers)
    entry("Data", f"{_data(run, splits)}{f'. {day}' if day else ''}")
    if trains:
        entry("Objective", f"{_objective(run)}. {on_policy or 'Responses are those of the data'}")
        entry("Optimizer", _optimizer(run, splits))
    if cache:
        entry("Cache", cache)
    report_memory(run.memory, run.device_memory)
    if trains:
        entry("Output", _output(run))
        entry("Sample", first_sample(run.sample))
        notes = [*notes, *_padding(run)]
    for note in notes:
        entry("Note", note)
    for doubt in find_doubts(run, splits) if trains else ():
        entry("Warning", doubt)


def short_name(directory: Path) -> str:
    """The end of a path, by which people know a model."""
    return "/".join(directory.absolute().parts[-2:])


def amount(parameters: float) -> str:
    """A number of parameters in a unit that suits it."""
    unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M") if parameters >= 1e5 else (1e3, "K")
    return f"{parameters / unit:,.{2 if unit == 1e9 else 1}f} {name}"


def sizes(run: Run) -> dict[str, int]:
    """How many parameters a run's models have by role, a LoRA student without its adapters."""
    student, teacher = run.memory.sizes
    adapters = student.trained if run.lora.r is not None else 0
    return {"student": student.whole - adapters, "teacher": teacher.whole}


def _model(run: Run, role: str) -> str:
    config = run.pair.student_config if role == "student" else run.pair.teacher_config
    return f"{short_name(run.pair.directories[role])} ({config.n_layer} layers, {amount(sizes(run)[role])} parameters)"


def _pair(run: Run) -> str:
    size, text = sizes(run), f"student {_model(run, 'student')}"
    if run.pair.others:
        text += f", taught by {_several(run)}"
    elif run.memory.shares_base:
        text += ", whose base is its teacher, held in memory once"
    else:
        text += f", teacher {_model(run, 'teacher')}, {size['teacher'] / size['student']:.2g} times as large"
    if run.memory.teacher_role == "cached" and not run.pair.others:
        loaded = "its LM head alone" if run.memory.top_k is None else "nothing of it"
        text += f", cached: {loaded} is loaded"
    if run.lora.r is not None:
        trained = amount(run.memory.sizes[0].trained)
        text += f". LoRA of rank {run.lora.r} on {', '.join(run.lora.targets)}: {trained} parameters are trained"
    return text


def _several(run: Run) -> str:
    """The teachers, and what each counts."""
    teachers = []
    for part, share in zip(runs_of_teachers(run), shares(run.teachers), strict=True):
        cached = ", cached: its LM head alone is loaded" if part.memory.teacher_role == "cached" else ""
        teachers.append(f"{share:.3g} of {_model(part, 'teacher')}{cached}")
    return f"the average of {len(teachers)} teachers: {'; '.join(teachers)}"


def _data(run: Run, splits: Splits) -> str:
    training, validation = splits
    return (
        f"{len(training):,} records of {training.tokens:,} tokens, {len(validation):,} more held out;"
        f" {run.sample['texts']}{describe_mask(run.data)}; {run.sample['labels']}"
    )


def _objective(run: Run) -> str:
    distill, loss = run.distill, run.distill.loss()
    names = ("mu", "head_rule") if distill.divergence == "akl" else OPTIONS.get(distill.divergence, ())
    changing = {name: f"{first:g} to {last:g}" for name, (first, last) in distill.schedule.given.items()}
    own = ", ".join(f"{name} {changing.get(name, getattr(loss, name))}" for name in names)
    fused = ", fused by torch.compile" if loss.compiles_on(run.memory.device) else ""
    ids = ""
    if run.memory.top_k is not None:
        # that of on-policy samples is of all ids, and fused where it can be
        fused = fused if distill.on_policy > 0 else ""
        ids = f" on the teacher's {run.memory.top_k.k:,} most probable ids and all others as one"
    return (
        f"{distill.divergence}{f' ({own})' if own else ''}{ids}, kd_ratio {distill.kd_ratio},"
        f" temperature {changing.get('temperature', distill.temperature)}{fused}"
    )


def _optimizer(run: Run, splits: Splits) -> str:
    train, samples = run.train, len(splits[0])
    # only an optimizer knows what it has by default
    trial = make_optimizer(run.optimizer, nn.Linear(2, 2, bias=False), run.memory.optimizer_is_fused)
    warmup = warmup_steps(train, samples)
    rises = f" after {warmup:,} step{'s' * (warmup > 1)} of warm-up" if warmup else ""
    limit = f", for {train.max_time:,.0f} s at most" if train.max_time else ""
    return (
        f"{type(trial).__name__}, lr {trial.param_groups[0]['lr']:g}{rises}, then by a cosine to {train.min_lr:g};"
        f" {describe_steps(train, samples)}{limit}"
    )


def _output(run: Run) -> str:
    interval, minutes = run.train.save_interval, run.save_minutes
    times = [f"every {interval:,} steps"] if interval is not None else []
    times += [f"every {minutes:g} minutes"] if minutes else []
    saved = f"a checkpoint {' and '.join(times)}" if times else "no checkpoints on the way"
    return f"{run.out_dir}: the student in {FINAL}, the report in {PAGE}, {saved}"


def _padding(run: Run) -> list[str]:
    told = describe_padding(run.pair.student_config, count_ids(run.pair.student_dir, run.pair.tokenizer))
    return [f"{told} The student is trained and written without them."] if told else []


def find_doubts(run: Run, splits: Splits) -> Iterator[str]:
    """What a user may not have meant, each with a way out."""
    size, pair = sizes(run), run.pair
    if size["teacher"] <= size["student"] and not run.memory.shares_base:
        yield (
            f"the teacher has {amount(size['teacher'])} parameters, the student {amount(size['student'])}: it may have"
            f" little to teach. To swap them: litgpt finetune_akl {shlex.quote(str(pair.teacher_dir))}"
            f" --teacher_checkpoint_dir {shlex.quote(str(pair.student_dir))}"
        )
    if getattr(run.data, "mask_prompt", None) is False:
        yield "the prompts count in the loss like responses. --data.mask_prompt true leaves them out."
    if doubt := _doubt_of_style(run, len(splits[0])):
        yield doubt
    if run.distill.kd_ratio == 0:
        yield (
            "With kd_ratio 0 the loss is cross-entropy alone: the divergence is measured, and teaches nothing."
            " --distill.kd_ratio 0.5 lets it teach."
        )
    if len(splits[1]) == 0:
        yield "There are no validation samples: validation is off, and nothing will tell what the student has learnt."
    elif len(splits[1]) < FEW:
        held_out = f"Validation reads {len(splits[1])} held-out records: what it says of the student is rough."
        # held out of one file, and not a file of their own
        is_share = Path(str(getattr(run.data, "path", ""))).is_file() and run.data.val_path is None
        is_share = is_share or getattr(run.data, "val_split_fraction", None) is not None
        yield f"{held_out} {'--data.val_split_fraction 0.2 holds out a fifth.' if is_share else 'Give it more.'}"


def _doubt_of_style(run: Run, samples: int) -> str | None:
    """What to say of prompts that a style has written, if the student's own form is another one."""
    style, directory, tokenizer = run.prompt_style, run.pair.student_dir, run.pair.tokenizer
    if style is None or getattr(run.data, "by_template", 0) >= samples:
        return None
    own, template = own_prompt_style(directory), None
    if tokenizer.backend == "huggingface":
        template = ChatTemplate.find(directory)
    if _writes_alike(style, own) or (template is not None and same_ids(style, template, tokenizer)):
        return None
    wrote = f"the prompts are in the style {type(style).__name__}, the student's own"
    names = [name for name, kind in prompt_styles.items() if kind is type(own)]
    if names and not isinstance(own, Default):
        return f"{wrote} is {type(own).__name__}: --data.prompt_style {names[0]}."
    if template is not None and template.path.name in READ_BY_TRANSFORMERS:
        return (
            f"{wrote} form is its chat template, which writes chats: give records with messages to --data StreamingSFT"
        )
    return None


def _writes_alike(one: PromptStyle, other: PromptStyle) -> bool:
    return all(one.apply(probe) == other.apply(probe) for probe in PROBES)


FEW = 5
"""Held-out records, of which fewer are warned of."""


ROWS = {
    "val_forward_kl": ("forward KL to the teacher, nats a token", "lower"),
    "val_reverse_kl": ("reverse KL to the teacher, nats a token", "lower"),
    "val_agreement": ("share with the teacher's top-1 token", "higher"),
    "val_cross_entropy": ("cross-entropy of the responses, nats a token", "lower"),
    "val_ppl": ("perplexity of the responses", "lower"),
}
"""Of the table at the end, and which way is better."""


OF_ONE = "val_forward_kl_"
"""How the columns of several teachers begin, each of which is compared by itself; its number follows."""


QUICK = {"max_records": "50", "generation.max_prompts": "10", "generation.seeds": "[10]"}
QUICK |= {"generation.max_new_tokens": "64"}
"""Options of an evaluation that takes a minute where one of all records takes an hour."""


OF_IDS = "Both KLs take all ids but the teacher's {:,} most probable ones for one, and are lower than those of all ids."


def close(run: Run, log: Path | None, records: int) -> None:
    """Print what a run has come to, from its ``log`` of metrics, and how to go on; in process 0, after all else.

    ``records`` is how many the validations have read.
    """
    validations = _validations(log)
    if len(validations) > 1:
        teachers = [short_name(pair.teacher_dir) for pair in run.pair.of_each]
        print(f"\n{table(validations[0], validations[-1], records, teachers)}\n", flush=True)
        if run.memory.top_k is not None:
            entry("Note", f"{OF_IDS.format(run.memory.top_k.k)} evaluate_akl has those of all ids.")
    entry("Student", run.out_dir / FINAL)
    if (run.out_dir / PAGE).is_file():
        entry("Report", run.out_dir / PAGE)
    if run.export_hf:
        entry("Export", f"{run.out_dir / FINAL_HF}, for Transformers, vLLM and llama.cpp")
    print("\nNext:", flush=True)
    for words in next_commands(run):
        print(shown(f"  {command_line(words)}"), flush=True)
    if run.pair.teacher_tokenizer is not None:
        return
    few = f"{QUICK['max_records']} records and {QUICK['generation.max_prompts']} prompts"
    print(f"evaluate_akl reads {few} at most, for a first look: leave those options out for all.", flush=True)


def _validations(log: Path | None) -> list[dict[str, float]]:
    """The rows of a log that are of validations, in order; none if it cannot be read."""
    try:
        with log.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val_forward_kl")]
        names = ["step", "val_teacher_cross_entropy", *ROWS]
        names += [name for name in (rows[0] if rows else ()) if name.startswith(OF_ONE)]
        return [{name: float(row[name]) for name in names} for row in rows]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error):
        return []


def table(before: dict[str, float], now: dict[str, float], records: int, teachers: Sequence[str] = ()) -> str:
    """Two validations of so many records beside the teacher, for people; ``teachers`` are the names of several."""
    cross_entropy = now["val_teacher_cross_entropy"]
    teacher = {"val_forward_kl": 0.0, "val_reverse_kl": 0.0, "val_agreement": 1.0, "val_cross_entropy": cross_entropy}
    teacher["val_ppl"] = math.exp(min(cross_entropy, 700.0))
    step = f"step {before['step']:.0f}"
    lines = [f"{f'On {records:,} held-out records, which way is better':53}{step:>9}{'now':>9}{'teacher':>9}"]
    own = {f"{OF_ONE}{number}": (f"forward KL to {of[-30:]}", "lower") for number, of in enumerate(teachers, start=1)}
    # a single teacher has no such row
    for name, (text, better) in (ROWS | {name: row for name, row in own.items() if name in now}).items():
        cells = "".join(f"{readable_measure(name, of[name]):>9}" for of in (before, now, teacher) if name in of)
        lines.append(f"{text:46}{better:<7}{cells}")
    return "\n".join(lines)


def readable_measure(name: str, value: float) -> str:
    """A measure in as many digits as say something."""
    if name.endswith("agreement"):
        return f"{value:.1%}"
    return readable_perplexity(value) if name.endswith("ppl") else f"{value:.3f}"


def readable_perplexity(value: float) -> str:
    """In as many digits as say something: above 10,000 a model guesses, and how badly is no matter."""
    return "> 10,000" if value > 10_000 else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def command_line(words: list[str]) -> str:
    """Words as a shell takes them, over several lines that a terminal need not break, as far as a word allows it."""
    lines = [""]
    for word in map(shlex.quote, words):
        # an option stays with its value
        if lines[-1] and word.startswith("--") and len(lines[-1]) > 40:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n  ".join(lines)


def next_commands(run: Run) -> list[list[str]]:
    """What to do with a student, in words of a command line."""
    final, pair = str(run.out_dir / FINAL), run.pair
    evaluation = ["litgpt", "evaluate_akl", final, "--teacher_checkpoint_dir", str(pair.teacher_dir)]
    evaluation += ["--before_checkpoint_dir", str(pair.student_dir), *_data_words(run)]
    if run.train.max_seq_length is not None:
        evaluation += ["--max_seq_length", str(run.train.max_seq_length)]
    for name, value in QUICK.items():
        evaluation += [f"--{name}", value]
    # two tokenizers have no distributions that it could compare
    commands = [["litgpt", "chat", final], *([evaluation] if pair.teacher_tokenizer is None else [])]
    return commands if run.export_hf else [*commands, ["litgpt", "export_hf", final, str(run.out_dir / FINAL_HF)]]


def _data_words(run: Run) -> list[str]:
    """The options that make a run's data again, without those that are as they are by default."""
    found = yaml.safe_load(run.recipe)["data"]
    if found is None:
        return []
    kind = type(run.data)
    usual = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    package = kind.__module__.partition(".")[0]
    words = ["--data", kind.__name__ if package in ("litgpt", "litgpt_akl") else found["class_path"]]
    for name, value in found["init_args"].items():
        if name not in usual or value != plain(usual[name]):
            words += [f"--data.{name}", _as_word(value)]
    return words


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
