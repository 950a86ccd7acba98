"""What a teacher's parts are worth on calibration records: which are read, and the long work with its progress."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule

from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import collate
from litgpt_akl.messages import UserError, progress_bar, say
from litgpt_akl.models.depth import DepthSearch, Removal
from litgpt_akl.models.importance import Importance, measure_importance
from litgpt_akl.models.layerwise import LayerwiseModel, Sample
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.tokenizer import token_map
from litgpt_akl.training.run import choose_day


def ids_in_use(teacher_dir: Path, config: Config) -> int:
    """Ids that a teacher's tokenizer and its LM head have."""
    return min(1 + max(token_map(read_tokenizer(teacher_dir))), config.padded_vocab_size)


def read_samples(
    data: DataModule, teacher_dir: Path, config: Config, records: int, max_seq_length: int | None
) -> list[Sample]:
    """So many of the data's training records, evenly spread over all of them; fewer if there are no more.

    Raises:
        UserError: the data cannot be read, or none of these records has a response.
    """
    dataset, _ = _read_datasets(data, teacher_dir, config, max_seq_length)
    if getattr(data, "date", None):
        say(choose_day([teacher_dir]))
    numbers = spread(len(dataset), records)
    samples = _with_responses(dataset, numbers)
    if not samples:
        raise UserError(f"--data: none of {len(numbers):,} records has a response.\nGive data with responses.")
    if len(samples) < records:
        without = f", and {len(numbers) - len(samples):,} without a response are left out" * (
            len(samples) < len(numbers)
        )
        say(f"--records {records}: the data has {len(dataset):,}{without}.")
    return samples


def read_held_out(
    data: DataModule, teacher_dir: Path, config: Config, records: int, max_seq_length: int | None
) -> list[Sample]:
    """The first validation records of the data, so many or all, as a run of finetune_akl validates.

    Raises:
        UserError: there are none, or none of them has a response.
    """
    _, dataset = _read_datasets(data, teacher_dir, config, max_seq_length)
    samples = _with_responses(dataset, range(min(records, len(dataset))))
    if not samples:
        raise UserError(
            "--candidates: the data holds out no records with a response, by which candidates could be compared.\n"
            "Hold some out by the data's own options, or leave --candidates out."
        )
    return samples


def _read_datasets(
    data: DataModule, teacher_dir: Path, config: Config, max_seq_length: int | None
) -> tuple[TokenizedDataset, TokenizedDataset]:
    train = TrainArgs(micro_batch_size=1, max_seq_length=max_seq_length)
    known = {"date": choose_day([teacher_dir]).date, "teacher_dir": teacher_dir}
    known["vocab_size"] = ids_in_use(teacher_dir, config)
    options = train, config.block_size, teacher_dir, "--max_seq_length"
    return prepare_datasets(data, read_tokenizer(teacher_dir), *options, **known)


def _with_responses(dataset: TokenizedDataset, numbers: Sequence[int]) -> list[Sample]:
    batches = [collate([sample]) for sample in dataset.read(numbers)]
    return [Sample(batch.input_ids[0], batch.positions, batch.labels) for batch in batches if len(batch.positions)]


def spread(total: int, count: int) -> list[int]:
    """So many numbers below a total, evenly spread; all if there are no more."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)).tolist()


def score(model: LayerwiseModel, samples: Sequence[Sample]) -> Importance:
    """The importance of all parts of a teacher."""
    tokens = sum(len(sample.input_ids) for sample in samples)
    say(f"Scoring the teacher's parts on {len(samples):,} records ({tokens:,} tokens).")
    total = model.config.n_layer * len(samples)
    with progress_bar(total=total, desc="scoring", unit=" blocks", unit_scale=True, leave=False) as bar:
        return measure_importance(model, samples, bar.update)


def remove_layers(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    layers: int,
    keep_ends: bool,
    vocab_size: int,
    before: Sequence[Removal],
    keep: Callable[[list[Removal]], object],
) -> list[Removal]:
    """Remove layers until so many are left, each time the one without which the forward KL on the samples is lowest.

    Those that were removed ``before`` come first, and ``keep`` is given all of them after each.
    """
    count = f"{model.config.n_layer - layers - len(before)}{' more' if before else ''}"
    tokens = sum(len(sample.positions) for sample in samples)
    say(
        f"Removing {count} layers one at a time by forward KL on {len(samples)} records ({tokens:,} response tokens);"
        " --method block_influence takes no such search, and with --scores FILE one that is interrupted goes on."
    )
    search = DepthSearch(model, samples, vocab_size)
    total = search.work(layers, keep_ends, len(before))
    with progress_bar(desc="removing layers", total=total, unit=" blocks", unit_scale=True, leave=False) as bar:
        return search.remove(layers, keep_ends, bar.update, before, keep)
