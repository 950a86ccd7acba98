"""A data module for records that are far more than memory holds, on local disks or in object storage."""

import math
import os
import sys
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt.data import DataModule
from litgpt.model import Config
from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
from litgpt.tokenizer import Tokenizer

from litgpt_akl.data.accounting import tell_what_is_left_out, tell_what_occurs_twice
from litgpt_akl.data.aligned_dataset import AlignedDataset, OtherTokenizer
from litgpt_akl.data.dataset import ALL, ArrowDataset
from litgpt_akl.data.encoding import puts_marks
from litgpt_akl.data.files import find_files, group_by_split
from litgpt_akl.data.formats import COLUMNS
from litgpt_akl.data.preparation import FileRecords, RowsOf, Settings, prepare
from litgpt_akl.data.workers import available_cores
from litgpt_akl.files.directories import default_cache_dir
from litgpt_akl.files.reading import explain_damage
from litgpt_akl.messages import UserError, say
from litgpt_akl.models.chat_template import ChatTemplate, named_templates
from litgpt_akl.models.model_files import read_tokenizer

if TYPE_CHECKING:
    import datasets


@dataclass
class StreamingSFT(DataModule):
    """Instruction and chat records from files of any size, prepared once and then read from disk as they are needed."""

    path: str
    """A JSON, JSONL or Parquet file (JSON and JSONL also as .gz or .zst), a folder of them, a glob, or a URL of these
    such as s3://, gs:// or hf://. A record has 'instruction', 'output' and optionally 'input', or chat 'messages', or
    another tool's format: 'prompt' and 'completion', 'question' and 'answer', or ShareGPT's 'conversations'."""
    mask_prompt: bool = False
    """Whether to mask the prompt section from the label (with ``ignore_index``)."""
    val_path: str | None = None
    """Like ``path``, for validation."""
    val_split_fraction: float | None = None
    """The fraction of the records to hold out for validation (default: 0.05 without ``val_path``). A hash of the record
    decides, so that a record stays on its side when others are added."""
    prompt_style: str | PromptStyle | None = None
    """The style to apply to prompts (default: the student's own). Chat messages take the tokenizer's chat template
    instead if it has one. See `litgpt.prompts` for a list of available styles."""
    columns: dict[str, str] | None = None
    """The data's names of fields by ours, such as ``{instruction: question, output: answer}``. Ours are messages,
    instruction, output, input, system, history, tools and documents."""
    chat_template: str | None = None
    """The chat template to use in place of the student's default: a file in Jinja's language, the name of one of
    several that the student has, or ``teacher``."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template is told beside the messages, such as ``{enable_thinking: false}``."""
    train_on: Literal["all", "last"] = "all"
    """Which of a chat's responses are learnt: all, or only the last. A message with ``weight: 0`` or ``train: false``
    is never learnt."""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """What becomes of records that are longer than ``train.max_seq_length`` or than the models can read: they are left
    out and counted, cut off at their end, or stop the run."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether to stop at a bad record or to leave bad records out; more than 1 % of them always stop."""
    micro_batch_tokens: int | None = None
    """Tokens of a micro-batch, padding counted; in place of ``train.micro_batch_size``, or ``batch_size`` of
    evaluate_akl. Prompts that a model answers together have no more of them either."""
    num_workers: int = 2
    """How many DataLoader processes to use for loading."""
    num_proc: int | None = None
    """How many processes prepare the data (default: one for each core)."""
    cache_dir: Path | None = None
    """Where prepared data is kept (default: ``litgpt_akl`` in the cache of Hugging Face datasets)."""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    max_seq_length: int | None = field(default=None, init=False, repr=False)
    date: str | None = field(default=None, init=False, repr=False)
    """The day that prompts have in them, once they are prepared; None if the chat template writes none."""
    template: ChatTemplate | None = field(default=None, init=False, repr=False)
    """What chats are written by, once they are prepared."""
    by_template: int = field(default=0, init=False, repr=False)
    """Records that it wrote; the prompt style wrote all others."""
    ends: tuple[int, ...] = field(default=(), init=False, repr=False)
    """The id with which the template ends a response, where records may have none that shows it."""

    def __post_init__(self) -> None:
        super().__init__()
        # it is chosen later if it is not now, and stays when the data is prepared again
        self._style_is_chosen = self.prompt_style is not None
        if isinstance(self.prompt_style, str):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)
        fraction = self.val_split_fraction
        if fraction is not None and self.val_path is not None:
            raise UserError(
                f"--data.val_path {self.val_path} and --data.val_split_fraction {fraction} both choose the validation"
                " records. Give one of them."
            )
        if fraction is not None and not 0 <= fraction < 1:
            raise UserError(f"--data.val_split_fraction must be at least 0 and below 1, got {fraction}.")
        if unknown := sorted((self.columns or {}).keys() - set(COLUMNS)):
            raise UserError(
                f"--data.columns has '{unknown[0]}', which is no field of ours.\nGive the data's name by one of"
                f" {', '.join(COLUMNS)}, such as '{{instruction: question, output: answer}}'."
            )
        for name, least in (("micro_batch_tokens", 2), ("num_workers", 0), ("num_proc", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--data.{name} must be at least {least}, got {value}.")

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length

    def prepare(
        self,
        checkpoint_dir: Path,
        context_length: int,
        cut_by: str = "--train.max_seq_length",
        date: str | None = None,
        teacher_dir: Path | None = None,
        vocab_size: int | None = None,
        prompts_alone: bool = False,
        rows_of: RowsOf = prepare,
        teacher: OtherTokenizer | None = None,
    ) -> tuple[ArrowDataset, ArrowDataset]:
        """The training and the validation records; arguments are those of ``prepare_datasets``.

        Raises UserError for no data, a bad record, more than 1 % of them, a sample longer than ``micro_batch_tokens``.
        """
        common = checkpoint_dir, context_length, cut_by, date, teacher_dir, vocab_size
        settings = self.settings(*common, prompts_alone)
        if teacher is not None:
            settings = replace(settings, teacher=self._settings_of_teacher(teacher, cut_by, date))
        self.by_template, self.ends = 0, ()
        train_files, validation_files = self.files()
        if validation_files:
            prepared = [self._prepared(files, settings, rows_of) for files in (train_files, validation_files)]
            train, validation = (self._dataset(*each, settings, ALL, n > 0) for n, each in enumerate(prepared))
            tell_what_occurs_twice(*(rows for rows, _ in prepared))
        else:
            fraction = 0.05 if self.val_split_fraction is None else self.val_split_fraction
            prepared = self._prepared(train_files, settings, rows_of)
            ranges = (fraction, math.inf), (0.0, fraction)
            train, validation = (self._dataset(*prepared, settings, draws, n > 0) for n, draws in enumerate(ranges))
        if prompts_alone and self.by_template > 0:
            self.ends = (settings.encoder().end_of_responses(),)
        if len(train) == 0:
            raise UserError(
                f"--data.path {self.path} leaves no training records.\nHold fewer out, give more, or have long ones cut"
                " with --data.too_long cut."
            )
        longest = max(train.longest, validation.longest)
        if self.micro_batch_tokens is not None and longest > self.micro_batch_tokens:
            raise UserError(
                f"--data.micro_batch_tokens {self.micro_batch_tokens} is less than the {longest} tokens of the"
                f" longest sample.\nRaise it, or cut samples with {cut_by}."
            )
        return train, validation

    def settings(
        self,
        checkpoint_dir: Path,
        context_length: int,
        cut_by: str,
        date: str | None,
        teacher_dir: Path | None,
        vocab_size: int | None,
        prompts_alone: bool = False,
    ) -> Settings:
        """What decides what becomes of a record; arguments as above. The template and the style are chosen by then.

        Raises UserError for a template or a style that cannot be read.
        """
        if type(self.tokenizer) is Tokenizer:
            # LitGPT's own takes EOS tokens away, and keeps to limits that somebody left in tokenizer.json
            self.tokenizer = read_tokenizer(checkpoint_dir)
        if self.prompt_style is None:
            self.prompt_style = own_prompt_style(checkpoint_dir)
        self.template = self._find_template(checkpoint_dir, date, teacher_dir)
        self.date = self.template.date if self.template is not None and self.template.writes_date else None
        refused = None if self._style_is_chosen else _refusal_of_chats(self.template, checkpoint_dir, self.prompt_style)
        options = {
            "columns": self.columns,
            "keywords": self.chat_template_kwargs,
            "refuse_chats": refused,
            "last_only": self.train_on == "last",
            "prompts_alone": prompts_alone,
        }
        common = checkpoint_dir, self.tokenizer, self.prompt_style, self.max_seq_length, context_length
        return Settings(*common, self.on_error, cut_by, vocab_size, self.template, self.too_long, options)

    def _settings_of_teacher(self, teacher: OtherTokenizer, cut_by: str, date: str | None) -> Settings:
        """Those of the same records for a teacher of another tokenizer, which is asked in its own form."""
        own = copy(self)
        own.tokenizer, own.prompt_style, own.chat_template, own._style_is_chosen = teacher.tokenizer, None, None, False
        common = teacher.checkpoint_dir, teacher.context_length, cut_by, date, None, teacher.vocab_size
        return replace(own.settings(*common), reader=" of the teacher")

    def _find_template(self, checkpoint_dir: Path, date: str | None, teacher_dir: Path | None) -> ChatTemplate | None:
        choice = self.chat_template
        if self.tokenizer.backend != "huggingface":
            if choice is not None:
                raise UserError(
                    f"--data.chat_template {choice} has no effect: {checkpoint_dir} has a tokenizer.model, which reads"
                    " the marks of a template as common text.\nPut the model's tokenizer.json there, or remove it."
                )
            return None
        if choice == "teacher" and teacher_dir is not None:
            template = ChatTemplate.find(teacher_dir, date)
            if template is None:
                raise UserError(
                    f"--data.chat_template teacher: {teacher_dir} has no chat template of its own.\n"
                    "Give a file in Jinja's language in its place."
                )
            # only the one for all records is written into the student's files
            template.for_tools = None
            return template
        template = ChatTemplate.find(checkpoint_dir, date, choice)
        if template is not None and (self.chat_template_kwargs or template.opening_of_responses.strip()):
            # the student gets a template of its own, by which it will be asked whatever is given
            template.for_tools = None
        return template

    def files(self) -> tuple[list[str], list[str]]:
        """The files to train on and those to validate on, which may be none; no file is both.

        Raises UserError if one would be, or if it cannot be told which are to be trained on.
        """
        files = find_files(self.path)
        held_out = [] if self.val_path is None else find_files(self.val_path, "--data.val_path")
        places = {os.path.realpath(file) for file in held_out}
        if both := sorted(file for file in files if file in held_out or os.path.realpath(file) in places):
            raise UserError(
                f"{both[0]} is in both --data.path {self.path} and --data.val_path {self.val_path}"
                f" ({len(both):,} such files).\nMove it out of one, or name the files of one by a glob."
            )
        groups = group_by_split(held_out)
        if len(groups) > 1 and (chosen := groups.get("validation", groups.get("test"))):
            told = f"{len(chosen):,} files are held out, {len(held_out) - len(chosen):,} of other splits are left out"
            say(f"{self.val_path}: {told}, such as {next(f for f in held_out if f not in chosen)}.", file=sys.stderr)
            held_out = chosen
        training, validation = self._choose_splits(files)
        return training, held_out if self.val_path is not None else validation

    def _choose_splits(self, files: list[str]) -> tuple[list[str], list[str]]:
        """Those of the files to train on, and those that are held out by their names."""
        groups = group_by_split(files)
        if groups.keys() <= {"training", ""} or len(groups) == 1:
            return files, []
        name = "training" if "training" in groups else ""
        if name not in groups:
            raise UserError(
                f"--data.path {self.path} has files named {' and '.join(groups)}, and none named train: {files[0]}.\n"
                "Give the file to train on as --data.path, and one to validate on as --data.val_path."
            )
        wants = self.val_split_fraction is None and self.val_path is None
        held_out = groups.get("validation", []) if wants else []
        left_out = [file for file in files if file not in groups[name] and file not in held_out]
        counts = [f"{len(groups[name]):,} files named {'train' if name else 'as no split'} are trained on"]
        counts += [f"{len(held_out):,} named validation are held out"] if held_out else []
        counts += [f"{len(left_out):,} more are left out, such as {left_out[0]}"] if left_out else []
        say(f"{self.path}: {', '.join(counts)}.", file=sys.stderr)
        return groups[name], held_out

    def _prepared(
        self, files: list[str], settings: Settings, rows_of: RowsOf
    ) -> tuple["datasets.Dataset", FileRecords]:
        records = FileRecords(files)
        rows = rows_of(records, settings, self.cache_dir or default_cache_dir(), self.num_proc or available_cores())
        if len(rows) == 0:
            raise UserError(f"There are no records in {', '.join(files[:3])}. Give a file that has some.")
        name = (
            files[0] if len(files) == 1 else f"{len(files):,} files of {os.path.dirname(os.path.commonprefix(files))}"
        )
        may_be_bad = self.on_error == "skip"
        self.by_template += tell_what_is_left_out(rows, name, records.place, settings.cut_by, may_be_bad)
        return rows, records

    def _dataset(
        self,
        rows: "datasets.Dataset",
        records: FileRecords,
        settings: Settings,
        draws: tuple[float, float],
        is_validated: bool,
    ) -> ArrowDataset:
        options = {"mask_prompt": self.mask_prompt, "settings": settings.fingerprint, "place": records.place}
        kind = ArrowDataset if settings.teacher is None else AlignedDataset
        return kind(rows, draws, least_response=int(is_validated), **options)


def _refusal_of_chats(template: ChatTemplate | None, checkpoint_dir: Path, style: PromptStyle) -> str | None:
    """What a user is told whose chats nothing can write that the student knows; None if something can."""
    if template is not None:
        return None
    named = ", ".join(named_templates(checkpoint_dir))
    if named:
        return (
            f"Chats cannot be read: {checkpoint_dir} has chat templates named {named}, and none is the default.\n"
            "Choose one with --data.chat_template NAME."
        )
    if not puts_marks(style):
        return (
            f"Chats cannot be read: {checkpoint_dir} has no chat template that its tokenizer reads, and its prompt"
            f" style {type(style).__name__} puts no marks between turns.\nGive one with --data.chat_template FILE or"
            " --data.chat_template teacher, or choose the turns' form with --data.prompt_style, such as qwen3."
        )
    return None


def own_prompt_style(checkpoint_dir: Path) -> PromptStyle:
    """The prompt style with which LitGPT talks to the model in ``checkpoint_dir``."""
    path = checkpoint_dir / "prompt_style.yaml"
    if has_prompt_style(checkpoint_dir):
        with explain_damage(path, "a prompt style", "Copy it again, or remove it to use the model's default."):
            style = load_prompt_style(checkpoint_dir)
            if not isinstance(style, PromptStyle):
                raise TypeError(f"{type(style).__name__} is no prompt style")
            return style
    return PromptStyle.from_config(Config.from_file(checkpoint_dir / "model_config.yaml"))
