"""How long a run's samples are: of prepared ones exactly, in a dry run by a look at the data, if that can be had."""

from collections.abc import Sequence
from dataclasses import dataclass

from litgpt.data import JSON, LitData
from litgpt.utils import extend_checkpoint_dir

from litgpt_akl.config.args import Options
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.files import is_local
from litgpt_akl.data.preview import Lengths, Look, Preview, measure
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.memory.estimate import MemoryEstimate, with_lengths
from litgpt_akl.models.generation import longest_prompt
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.pair import Models


@dataclass(frozen=True)
class Samples:
    """What a dry run knows of a run's samples."""

    training: Lengths
    validation: Lengths
    looks: Sequence[Look]

    def __str__(self) -> str:
        counts = f"{self.training.samples:,} training and {self.validation.samples:,} validation samples"
        longest = max(self.training.longest, self.validation.longest)
        tokens = self.training.tokens + self.validation.tokens
        about = "" if all(look.is_exact for look in self.looks) else "about "
        return f"Data: {about}{counts} of {tokens:,} tokens, the longest of {longest:,}; {self._source}."

    @property
    def _source(self) -> str:
        looked, records = (sum(getattr(look, name) for look in self.looks) for name in ("records", "all"))
        ways = {look.how for look in self.looks}
        some = f"by {min(looked, records):,} of about {records:,} records"
        if "spread" in ways:
            return f"{some} here and there, and how their lengths spread"
        if "largest" in ways:
            return f"{some}, the largest among them, and 10 % more for the longest"
        return "as they were prepared before" if ways == {"prepared"} else "all were encoded"


def why_unknown(options: Options) -> str | None:
    """Why the lengths of a run's samples cannot be told before it begins, to follow "since"; None if they can."""
    data, student_dir = options.data, extend_checkpoint_dir(options.checkpoint_dir)
    if isinstance(data, LitData):
        return "LitData's blocks all have as many"
    if isinstance(data, StreamingSFT):
        if remote := [path for path in (data.path, data.val_path) if path and not is_local(path)]:
            return f"{remote[0]} is not on this machine's disks"
        if data.chat_template == "teacher" and not extend_checkpoint_dir(options.teacher_dir).is_dir():
            return f"{options.teacher_dir}, whose chat template is meant, is not here"
    elif type(data) is not JSON:
        return (
            "no --data is given"
            if data is None
            else f"the records of --data {type(data).__name__} are fetched by the run"
        )
    return None if student_dir.is_dir() else f"{options.checkpoint_dir}, whose tokenizer is needed, is not here"


def look_at_samples(options: Options, models: Models, estimate: MemoryEstimate, date: str) -> Samples:
    """The lengths of samples that :func:`why_unknown` has no objection to; nothing is written.

    Raises UserError, as the run would, for data that cannot be read or does not go with the options.
    """
    fills, student_dir = options.teacher.cache_mode == "fill", extend_checkpoint_dir(options.checkpoint_dir)
    preview = Preview()
    splits = prepare_datasets(
        options.data,
        read_tokenizer(student_dir),
        options.train,
        models.context_length,
        student_dir,
        date=date,
        teacher_dir=extend_checkpoint_dir(options.teacher_dir),
        vocab_size=models.vocab_size,
        prompts_alone=options.distill.on_policy == 1 and not fills,
        rows_of=preview,
    )
    return Samples(*_measure(estimate, splits, options.distill, preview.looks), preview.looks)


def with_samples(estimate: MemoryEstimate, splits: Sequence[TokenizedDataset], distill: DistillArgs) -> MemoryEstimate:
    """The estimate, made with samples as long as they may be, of a run that trains and validates on these."""
    return with_lengths(estimate, *_measure(estimate, splits, distill, [None]), distill)


def _measure(
    estimate: MemoryEstimate, splits: Sequence[TokenizedDataset], distill: DistillArgs, looks: Sequence[Look | None]
) -> tuple[Lengths, Lengths]:
    limit, answers = estimate.longest_sample, distill.on_policy > 0 and estimate.teacher_role != "fill"
    answerable = min(limit - 1, longest_prompt(estimate.student)) if answers else 0
    return measure(splits[0], looks[0], limit, answerable), measure(splits[1], looks[-1], limit)
