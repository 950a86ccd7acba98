"""`litgpt generate_responses`: a teacher writes the responses that a student is then trained on."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from litgpt.data import DataModule
from torch import Tensor, nn

from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.config.checks import check_hybrid_sharding, count_devices
from litgpt_akl.config.refusals import check_at_least_one
from litgpt_akl.data.encoding import Encoder
from litgpt_akl.data.formats import with_response
from litgpt_akl.data.preparation import FileRecords, Settings
from litgpt_akl.data.records import Record
from litgpt_akl.data.response_file import Progress, ResponseFile
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.data.workers import end_with_parent
from litgpt_akl.files.lock import locked
from litgpt_akl.messages import UserError, progress_bar, say
from litgpt_akl.models.generation import longest_prompt, stop_sequences
from litgpt_akl.models.gpt import Precision, frozen_precision, load_frozen
from litgpt_akl.models.pair import check_pair
from litgpt_akl.models.weights import find_checkpoint_dir, fingerprint
from litgpt_akl.training.launch import StopSignals, ending_together, leave_if_stopped, start
from litgpt_akl.training.logging import silence_known_noise
from litgpt_akl.training.out_dir import check_apart, is_within
from litgpt_akl.training.responses import Question, ResponseSampler
from litgpt_akl.training.run import Day, choose_day

TOGETHER = 64
"""Records, at least, whose responses are written together."""
MADE_WITH = "samples temperature top_k top_p max_new_tokens truncated seed max_records".split()
"""Options that decide what is written."""


@dataclass
class ResponseGeneration:
    """One call of the command, checked, under the names of its signature; what was left out is chosen."""

    checkpoint_dir: Path
    data: DataModule | None
    out: Path
    overwrite: bool
    samples: int
    temperature: float
    top_k: int | None
    top_p: float
    max_new_tokens: int
    truncated: Literal["drop", "keep"]
    seed: int
    batch_size: int
    max_records: int | None
    precision: Precision | None
    devices: int | str
    num_nodes: int
    hybrid_sharding: bool
    access_token: str | None

    def __post_init__(self) -> None:
        names = ("samples", "top_k", "max_new_tokens", "batch_size", "max_records")
        check_at_least_one(**{name: getattr(self, name) for name in names})
        if not self.temperature >= 0 or self.seed < 0:
            raise UserError(f"--temperature {self.temperature} and --seed {self.seed} must not be negative.")
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"--top_p must be above 0 and at most 1, got {self.top_p}.\n"
                "--temperature 0 takes the most probable id; 1 draws from all."
            )
        self._check_drawing()
        if not isinstance(self.data, StreamingSFT):
            given = "none" if self.data is None else type(self.data).__name__
            raise UserError(
                f"--data {given}: prompts are read from files of records.\n"
                "Give --data StreamingSFT --data.path FILE; it reads JSON, JSONL and Parquet."
            )
        self.out = Path(self.out)
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out {self.out} is to hold lines of JSON: give a name that ends in .jsonl.")
        self.devices = count_devices(self.devices, self.num_nodes)
        check_hybrid_sharding(self.hybrid_sharding, self.devices, self.num_nodes)
        self.precision, self.dtype = frozen_precision(self.precision)
        directory = find_checkpoint_dir(self.checkpoint_dir, "teacher", self.access_token, option="checkpoint_dir")
        check_apart("--out", self.out, {"teacher": directory})
        data = Path(self.data.path)
        if data.exists() and is_within(self.out, data):
            raise UserError(f"--out {self.out} lies in --data.path {data}, which is read.\nGive another --out.")
        self.pair = check_pair(directory, directory)

    def _check_drawing(self) -> None:
        if self.temperature == 0:
            for name, nothing in (("top_k", None), ("top_p", 1.0)):
                if (value := getattr(self, name)) != nothing:
                    raise UserError(
                        f"--{name} {value} has no effect with --temperature 0, which takes the most probable id."
                        "\nRemove it, or give a temperature such as 1.0."
                    )
        if self.samples > 1 and (self.temperature == 0 or self.top_k == 1):
            given = "--temperature 0" if self.temperature == 0 else "--top_k 1"
            raise UserError(
                f"--samples {self.samples} with {given}: all responses to a prompt would be the same one.\n"
                "Give --samples 1, or a temperature such as 1.0 without top_k."
            )


def generate_responses(
    checkpoint_dir: Path,
    *,
    data: DataModule | None = None,
    out: Path,
    overwrite: bool = False,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    truncated: Literal["drop", "keep"] = "drop",
    seed: int = 42,
    batch_size: int = 16,
    max_records: int | None = None,
    precision: Precision | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    hybrid_sharding: bool = False,
    access_token: str | None = None,
) -> None:
    r"""Let a teacher write the responses that a student is then trained on: sequence-level distillation.

    The method is of Kim and Rush, arXiv 1606.07947. Records keep their format and all other fields: ``--data
    StreamingSFT --data.path OUT`` reads them back. A response that a record has is replaced, of a chat the last one;
    records without one get one. The same command goes on where an earlier call was stopped.

    Example:
      litgpt generate_responses checkpoints/Qwen/Qwen3-8B \
          --data StreamingSFT --data.path prompts.jsonl --out taught.jsonl

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        data: ``StreamingSFT`` with the files of the prompts: of a folder with splits those named train. Prompts are
            those of training: by the teacher's chat template or prompt style, unless the data's options say otherwise.
        out: The file to write, whose name ends in ``.jsonl``.
        overwrite: Whether a file that is there, or was begun, may be replaced. One that the same command has
            finished is left as it is.
        samples: How many responses to draw for each prompt; each makes a record of its own.
        temperature: Divides the logits before an id is drawn; with 0 the most probable id is taken.
        top_k: Only the so many most probable ids are drawn, as in ``litgpt generate`` (default: all).
        top_p: Only the fewest ids that have so much of the probability together are drawn, as in ``litgpt generate``.
        max_new_tokens: Tokens of a response at most.
        truncated: What becomes of responses that reach their limit without an end: they are left out and counted, or
            kept.
        seed: What is drawn depends on it, on the record's number and on the sample's, and on nothing else.
        batch_size: Prompts that are answered together. Changes speed and memory, not the responses, up to rounding.
        max_records: How many of the data's records to read, from the first on (default: all).
        precision: What the model is held in and computed with (default: bf16-true on a GPU, 32-true on a CPU).
        devices: How many devices to use on each node. With more than one in all, the model is sharded.
        num_nodes: How many nodes the code is being run on.
        hybrid_sharding: Whether every node holds a whole model, sharded over its own devices only.
        access_token: Optional API token to access models with restrictions.
    """
    silence_known_noise()
    start(main, ResponseGeneration(**locals()))


@partial(ending_together, way_on="The others were ended; run the same command again.")
def main(fabric: L.Fabric, options: ResponseGeneration) -> None:
    """Generate in each process; the first one writes."""
    if fabric.local_rank > 0:
        end_with_parent()
    if not fabric.is_global_zero:
        _generate(fabric, options)
        return
    with locked(options.out, beside=True):
        _generate(fabric, options)


def _generate(fabric: L.Fabric, options: ResponseGeneration) -> None:
    file, begun, day = None, None, None
    if fabric.is_global_zero:
        file = ResponseFile(options.out)
        begun = file.begun(options.overwrite)
        # what goes on keeps the day that it began on
        day = choose_day([options.pair.teacher_dir]) if begun is None else Day(begun[0]["date"], str(file.partial))
    day = fabric.broadcast(day)
    prompts = Prompts(options, day.date)
    if options.data.date:
        fabric.print(day)
    progress = None if file is None else file.open({**prompts.identity, "date": day.date}, begun)
    if fabric.broadcast(file is not None and file.is_finished):
        fabric.print(
            f"{options.out} is finished already, by the same command: {_kept(options, progress.counts):,} records"
        )
        return
    surveyed = prompts.survey() if fabric.is_global_zero else None
    progress, (counts, ends) = fabric.broadcast((progress, surveyed))
    stop = stop_sequences(prompts.tokenizer, options.data.prompt_style, ends)
    if fabric.is_global_zero:
        prompts.tell(counts)
        if progress.records:
            say(f"Going on with {file.partial}: {progress.records:,} of {counts['records']:,} records are done.")
    if counts["prompts"] == 0:
        raise UserError(f"{options.data.path}: no record has a prompt that can be answered.\nGive other data.")
    model = load_frozen(fabric, options.pair.teacher_dir, options.pair.teacher_config, options.dtype)
    options.pair.check_unchanged("teacher")
    written = _write_all(fabric, options, model, prompts, stop, file, progress, counts["records"])
    if fabric.is_global_zero:
        prompts.source.check_unchanged()
        if _kept(options, written) == 0:
            # the same question would be answered so again
            file.discard()
            raise UserError(_describe_nothing(options, written))
        file.finish()
        _tell_end(options, written)


def _write_all(
    fabric: L.Fabric,
    options: ResponseGeneration,
    model: nn.Module,
    prompts: "Prompts",
    ends: list[list[int]],
    file: ResponseFile | None,
    progress: Progress,
    records_in_all: int,
) -> Counter:
    """Draw the responses to all prompts that are left, and write them some records at a time; returns the counts."""
    written, step = Counter(progress.counts), max(TOGETHER, 4 * options.batch_size * fabric.world_size)
    total, quiet = records_in_all * options.samples, not fabric.is_global_zero
    known = {"total": total, "initial": progress.records * options.samples, "unit": "answer"}
    bar = progress_bar(desc="answering", leave=False, disable=quiet, **known)
    args = GenerationArgs(
        seeds=prompts.seeds,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        no_repeat_ngram=None,
        batch_size=options.batch_size,
    )
    with bar, StopSignals(quiet=quiet) as stop:
        for records in prompts.read(progress.records, step):
            asked = [(number, record, prompt) for number, record, prompt in records if prompt is not None]
            questions = [Question(number, prompt, []) for number, _, prompt in asked]
            given = prompts.tokenizer, ends, options.pair.vocab_size, args, options.data.micro_batch_tokens
            sampler = ResponseSampler(fabric, questions, *given, top_k=options.top_k, top_p=options.top_p)
            drawn = [sampler.sample_once(model, seed, bar) for seed in args.seeds] if asked else []
            bar.update((len(records) - len(asked)) * options.samples)
            lines = ""
            for place, (_, record, _) in enumerate(asked):
                for responses in drawn:
                    ended, text = responses.ended[place], responses.texts[place]
                    kind = "empty" if not text.strip() else "written" if ended else "truncated"
                    written[kind] += 1
                    if kind == "written" or (kind == "truncated" and options.truncated == "keep"):
                        content = with_response(record.value, text, options.data.columns)
                        lines += json.dumps(content, ensure_ascii=False, default=str) + "\n"
            progress.records += len(records)
            progress.counts = dict(written)
            if file is not None:
                file.append(lines, progress)
            leave_if_stopped(fabric, stop, "The same command goes on.")
    return written


def _tell_end(options: ResponseGeneration, written: Counter) -> None:
    if written["truncated"]:
        became = "kept" if options.truncated == "keep" else "left out"
        say(
            f"{written['truncated']:,} responses had no end within {options.max_new_tokens:,} tokens or what the model"
            f" reads, and are {became}; --max_new_tokens and --truncated decide."
        )
    if written["empty"]:
        say(f"{written['empty']:,} responses were empty, and are left out.")
    say(f"Written to {options.out}: {_kept(options, written):,} records")


def _describe_nothing(options: ResponseGeneration, written: Mapping[str, int]) -> str:
    """What a user is told of whose responses none can be learnt."""
    return (
        f"No response can be kept, and {options.out} is not written: {written['truncated']:,} had no end within"
        f" {options.max_new_tokens:,} tokens, {written['empty']:,} were empty.\n"
        "Raise --max_new_tokens, give --truncated keep, or ask in another way with --data.prompt_style."
    )


def _kept(options: ResponseGeneration, written: Mapping[str, int]) -> int:
    """How many of the responses are in the file."""
    return written.get("written", 0) + (written.get("truncated", 0) if options.truncated == "keep" else 0)


class Prompts:
    """The records of the data, and what of each is a prompt for the model."""

    def __init__(self, options: ResponseGeneration, date: str | None) -> None:
        pair, data = options.pair, options.data
        self._options = options
        data.connect(pair.tokenizer)
        common = pair.teacher_dir, pair.teacher_config.block_size, "--max_new_tokens", date, pair.teacher_dir
        self.settings: Settings = data.settings(*common, pair.vocab_size)
        self.tokenizer = data.tokenizer
        self.source = FileRecords(data.files()[0])
        self.longest = longest_prompt(pair.teacher_config)
        # a seed's own numbers follow each other, and no two calls share them by chance
        self.seeds = [options.seed * 1_000_003 + sample for sample in range(options.samples)]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which lines are written, as plain data."""
        return {
            **{name: getattr(self._options, name) for name in MADE_WITH},
            "teacher": fingerprint(self._options.pair.teacher_dir),
            "data": self.source.identity,
            "prompt format": self.settings.fingerprint,
        }

    def survey(self) -> tuple[Counter, list[int]]:
        """How many records there are and what of them can be answered; and the special tokens that end responses.

        Raises:
            UserError: a record is bad, and bad ones are not to be skipped.
        """
        counts: Counter = Counter()
        ends: dict[int, None] = {}
        encoder = self.settings.encoder()
        records = progress_bar(self._records(0), desc="reading prompts", unit=" records", leave=False)
        for number, (file, record) in records:
            found = self._find(encoder, record)
            if found.error is not None and self.settings.on_error == "stop":
                place = self.source.place(file, record.line, number)
                raise UserError(self.settings.refusal.format(place=place, error=found.error))
            counts["records"] += 1
            counts["bad" if found.error else "long" if found.ids is None else "prompts"] += 1
            if found.end in self.tokenizer.special_ids:
                ends[found.end] = None
        return counts, [*ends]

    def tell(self, counts: Counter) -> None:
        """Say how many records are not answered, and why."""
        name = self._options.data.path
        say(f"{name}: {counts['prompts']:,} prompts of {counts['records']:,} records")
        if counts["bad"]:
            say(f"{name}: left out {counts['bad']:,} bad records of {counts['records']:,}.")
        if counts["long"]:
            say(f"{name}: left out {counts['long']:,} prompts that are longer than {self.longest:,} tokens.")

    def read(self, first: int, step: int) -> Iterator[list[tuple[int, Record, Tensor | None]]]:
        """The records from ``first`` on, ``step`` at a time: number, record and prompt, None if it is left out."""
        encoder, records = self.settings.encoder(), self._records(first)
        while some := [*islice(records, step)]:
            prompts = (self._find(encoder, record).ids for _, (_, record) in some)
            yield [(number, record, prompt) for (number, (_, record)), prompt in zip(some, prompts, strict=True)]

    def _records(self, first: int) -> Iterator[tuple[int, tuple[int, Record]]]:
        return islice(enumerate(self.source), first, self._options.max_records)

    def _find(self, encoder: Encoder, record: Record) -> "Prompt":
        try:
            if record.error is not None:
                raise ValueError(record.error)
            asked = encoder.encode(encoder.with_stand_in(record.value))
        except (ValueError, RecursionError, MemoryError) as error:
            return Prompt(None, None, str(error) or repr(error))
        begin, end = np.reshape(asked.spans, (-1, 2))[-1].tolist()
        return Prompt(torch.tensor(asked.ids[:begin]) if begin <= self.longest else None, asked.ids[end - 1], None)


class Prompt(NamedTuple):
    """What of a record is asked."""

    ids: Tensor | None
    """``[time]``; None if it is bad or too long."""
    end: int | None
    """The id with which its response would end."""
    error: str | None
    """What is wrong with it."""
