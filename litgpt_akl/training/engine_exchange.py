"""A teacher that an inference engine serves: the ids that it is to read, and its hidden states in a cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from litgpt.args import TrainArgs
from litgpt.data import DataModule
from torch import Tensor, nn

from litgpt_akl.config.args import CacheArgs
from litgpt_akl.config.checks import no_data
from litgpt_akl.config.recipe import check_masked
from litgpt_akl.config.refusals import check_at_least_one
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import TokenizedDataset, digest
from litgpt_akl.data.steps import collate
from litgpt_akl.loss.blockwise import LMHead
from litgpt_akl.loss.top_k import TopK, find_top_k, pack_head
from litgpt_akl.messages import UserError, progress_bar, say
from litgpt_akl.models.gpt import make_head
from litgpt_akl.models.pair import Pair, check_pair
from litgpt_akl.models.weights import find_checkpoint_dir, open_weights
from litgpt_akl.teacher.cache import Caches, TeacherCache, open_caches, write_head
from litgpt_akl.teacher.cache_identity import make_identity, read_identity
from litgpt_akl.teacher.chunk_file import Record
from litgpt_akl.teacher.engine_files import EngineFiles
from litgpt_akl.training.run import Splits, choose_day

PROBED = 32
"""Records by which it is seen whether hidden states are those before the final norm, and at their own ids."""
NEARLY = 0.02
"""Share by which states in bfloat16 may differ from what the norm would make of them."""
CLEARLY = 0.5
"""Nats by which another reading of the states must be better at the next ids for the states to be refused."""
AS_READ = "as they are"
TOGETHER = 256
"""Records that are read from a dataset at a time."""


@dataclass
class EngineExchange:
    """What both commands are about, under the names of their options: a cache of a teacher's states of some data."""

    checkpoint_dir: Path | None
    teacher_checkpoint_dir: Path
    data: DataModule | None
    teacher: CacheArgs
    max_seq_length: int | None
    access_token: str | None
    pair: Pair = field(init=False)
    splits: Splits = field(init=False)
    caches: Caches = field(init=False)

    def __post_init__(self) -> None:
        if self.data is None:
            raise UserError(no_data())
        if self.teacher.cache_dir is None:
            raise UserError(
                "--teacher.cache_dir is missing: the folder that is to hold the teacher's hidden states.\n"
                "Give it, the same to export_prompts, import_hidden_states and finetune_akl."
            )
        check_masked({"data": self.data})
        check_at_least_one(max_seq_length=self.max_seq_length)
        teacher_dir = find_checkpoint_dir(self.teacher_checkpoint_dir, "teacher", self.access_token)
        self.pair = check_pair(self.checkpoint_dir or teacher_dir, teacher_dir, self.access_token)
        find_top_k(self.teacher.cache_dtype, self.pair.vocab_size)

    def open(self) -> None:
        """Read the data, and open the cache or begin it."""
        directory = self.teacher.cache_dir
        day = choose_day((), directory)
        train = TrainArgs(micro_batch_size=1, max_seq_length=self.max_seq_length)
        options = train, self.pair.context_length, self.pair.student_dir, "--max_seq_length"
        known = {"date": day.date, "teacher_dir": self.pair.teacher_dir, "vocab_size": self.pair.vocab_size}
        self.splits = prepare_datasets(self.data, self.pair.tokenizer, *options, **known)
        if getattr(self.data, "date", None):
            say(day)
        recorded = (read_identity(directory) or {}).get("teacher_weights")
        of = self.pair, self.teacher, self.dtype, self.data, self.max_seq_length, self.splits
        identity = make_identity(*of, recorded=recorded)
        self.pair.check_unchanged("teacher")
        self.caches = open_caches(directory, identity, self.splits, writable=True)

    @property
    def dtype(self) -> torch.dtype:
        """What the teacher computes in, as a run with these options has it."""
        return self.teacher.dtype("cuda" if torch.cuda.is_available() else "cpu")

    def absent(self) -> Iterator[tuple[str, TeacherCache, TokenizedDataset, Tensor]]:
        """Of training and of validation, the samples of which the cache has nothing."""
        both = zip(("training", "validation"), self.caches[:2], self.splits, strict=True)
        for name, cache, dataset in both:
            yield name, cache, dataset, torch.from_numpy(cache.absent(torch.arange(len(dataset)).numpy()))


def prompts_of(exchange: EngineExchange) -> Iterator[dict]:
    """What an engine is to read for each sample that the cache lacks, as vLLM takes it: ids, and never a text."""
    for name, _, dataset, numbers in exchange.absent():
        for number, sample in samples(dataset, numbers):
            yield {"prompt_token_ids": sample["input_ids"].tolist(), "split": name, "number": number}


def samples(dataset: TokenizedDataset, numbers: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Some samples of a dataset with their numbers."""
    for some in numbers.split(TOGETHER):
        yield from zip(some.tolist(), dataset.read(some.numpy()), strict=True)


class LastLayers(nn.Module):
    """A teacher's final norm and LM head, of its whole a small part."""

    def __init__(self, exchange: EngineExchange) -> None:
        super().__init__()
        config = exchange.pair.teacher_config
        weights = open_weights(exchange.pair.teacher_dir, config)
        self.norm, self.head = config.norm_class(config.n_embd, eps=config.norm_eps), make_head(config)
        for module, prefix in ((self.norm, "transformer.ln_f."), (self.head, "lm_head.")):
            of = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            module.to(exchange.dtype).load_state_dict(of)
        self.requires_grad_(False)
        exchange.pair.check_unchanged("teacher")

    def rows(self, states: Tensor, labels: Tensor, top_k: TopK | None) -> Tensor:
        """What a cache keeps of normed states ``[n, width]`` that the ids ``[n]`` follow: they, or distributions."""
        if top_k is None:
            return states
        return pack_head(LMHead(states, self.head.weight, self.head.bias, self.head.softcap), labels, top_k)

    def head_weights(self) -> dict[str, Tensor]:
        """By the names that a teacher's whole weights have."""
        return {f"lm_head.{name}": tensor for name, tensor in self.head.state_dict().items()}

    def has_made(self, states: Tensor) -> bool:
        """Whether states ``[n, width]`` are the final norm's own: what it makes of them without its factors is they."""
        signs = torch.ones_like(states[0])
        signs[1::2] = -1
        # of a mean of 0 and a variance of 1 a norm leaves its factors
        bias = self.norm(torch.zeros_like(signs))
        factors = (self.norm(signs) - bias) * signs
        known = factors.abs() > 1e-6
        plain = torch.where(known, (states - bias) / factors.where(known, torch.ones_like(factors)), 0)
        distance = (self.norm(plain) - states)[:, known].float().norm()
        return bool(distance < NEARLY * states[:, known].float().norm())

    def nats(self, states: Tensor, ids: Tensor, normed: bool) -> float:
        """The mean surprise at ids ``[n]`` by states ``[n, width]`` that stand before each of them."""
        logits = self.head.logits(states if normed else self.norm(states)).float()
        return float(torch.nn.functional.cross_entropy(logits, ids))


@dataclass
class Imported:
    """What became of the records of one import."""

    records: int = 0
    """Whose hidden states are in the cache now."""
    lacking: dict[str, int] = field(default_factory=dict)
    """Of which there was no file, by split."""


@torch.no_grad()
def import_states(exchange: EngineExchange, files: EngineFiles, normed: bool) -> Imported:
    """Put the final hidden states of all files that are of samples into the cache; what else there is, is counted.

    Raises:
        UserError: the states are not those before the final norm at their own ids, or a file is not as it should be.
    """
    last, found = LastLayers(exchange), Imported()
    _check_states(exchange, files, last, normed)
    if exchange.caches.training.top_k is None:
        write_head(exchange.caches.directory, last.head_weights())
    total = sum(len(numbers) for *_, numbers in exchange.absent())
    with progress_bar(total=total, desc="importing", unit="record", leave=False, delay=1) as bar:
        for name, cache, dataset, numbers in exchange.absent():
            found.lacking[name] = 0
            for number, sample in samples(dataset, numbers):
                bar.update()
                file = files.find(sample["input_ids"])
                if file is None:
                    found.lacking[name] += 1
                    continue
                batch = collate([sample])
                states = files.read(file, sample["input_ids"], batch.positions).to(exchange.dtype)
                rows = last.rows(states if normed else last.norm(states), batch.labels, cache.top_k)
                cache.add([Record(number, digest(sample), rows)])
                found.records += 1
    exchange.caches.flush()
    return found


def _check_states(exchange: EngineExchange, files: EngineFiles, last: LastLayers, normed: bool) -> None:
    """See by some records that their next ids are likeliest by the states as they are read, not in another way."""
    readings = {AS_READ: 0, "moved back by one id": 1, "moved on by one id": -1}
    nats: dict[str, list[float]] = {name: [] for name in readings}
    for sample in _probed(exchange, files):
        ids, positions = sample["input_ids"], collate([sample]).positions
        # an id later there must be one, and an id earlier
        positions = positions[(positions > 0) & (positions < len(ids) - 1)]
        if len(positions) == 0:
            continue
        file, rows = files.find(ids), torch.cat([positions + shift for shift in readings.values()])
        states = files.read(file, ids, rows).to(exchange.dtype).split(len(positions))
        by_reading = dict(zip(readings, states, strict=True))
        if last.has_made(by_reading[AS_READ]) != normed:
            told = "are not" if normed else "are already"
            way_out = "Leave out --normed true." if normed else "Give --normed true."
            raise UserError(f"{file.path}: its hidden states {told} what the teacher's final norm makes.\n{way_out}")
        for name, found in by_reading.items():
            nats[name].append(last.nats(found, ids[positions + 1], normed))
    means = {name: sum(found) / len(found) for name, found in nats.items() if found}
    if not means:
        return
    best = min(means, key=means.get)
    if means[best] < means[AS_READ] - CLEARLY:
        raise UserError(
            f"{files.directory}: by its hidden states the responses of {len(nats[best])} records have"
            f" {means[AS_READ]:.2f} nats a token, and {means[best]:.2f} {best}.\n"
            "Write them anew, each at its own id."
        )
    say(f"By these hidden states the responses of {len(nats[best])} records have {means[AS_READ]:.2f} nats a token.")


def _probed(exchange: EngineExchange, files: EngineFiles) -> Iterator[dict[str, Tensor]]:
    found = 0
    for *_, dataset, numbers in exchange.absent():
        for _, sample in samples(dataset, numbers):
            if found == PROBED:
                return
            if files.find(sample["input_ids"]) is not None:
                found += 1
                yield sample
