"""A run takes as much memory as its longest micro-batch does, which is known before it, or assumed and said so."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.memory_runs import make_estimate, model
from helpers.runs import alice, train_args
from litgpt.data import Alpaca, DataModule, LitData
from litgpt.prompts import Default, Phi2

from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data import StreamingSFT
from litgpt_akl.data.preview import Lengths
from litgpt_akl.data.steps import StepSampler, cut
from litgpt_akl.memory.estimate import with_lengths
from litgpt_akl.messages import UserError
from litgpt_akl.teacher.cache_size import readable

SMALL = make_estimate(
    model(1, 64, 128), model(1, 64, 128), sequence_length=512, micro_batch_size=3, global_batch_size=9
)


SAID = r"Data: [\d,]+ training and \d+ validation samples of [\d,]+ tokens, the longest of (\d+); all were encoded"


def largest_micro_batch(lengths: np.ndarray, estimate) -> int:
    """Padded tokens: the slow, obvious reference, which cuts every step of some epochs."""
    sampler = StepSampler(len(lengths), estimate.global_batch_size, 1, lambda numbers: lengths[numbers])
    most = 0
    for epoch in range(20):
        for step in range(sampler.steps_per_epoch):
            own = lengths[sampler.step(epoch, step)]
            cuts = cut(own, estimate.micro_batch_size, estimate.micro_batch_tokens)
            most = max(most, *(own[part].max() * len(own[part]) for part in cuts))
    return most


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_batch_size": 10},
        {"micro_batch_size": 8, "global_batch_size": 4},
        {"micro_batch_tokens": 600},
        {"micro_batch_tokens": 1500},
        {"micro_batch_tokens": 100_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [2, 7, 300])
def test_no_micro_batch_is_larger_than_the_one_that_is_estimated(options, samples):
    # the longest are of about one length, as where records are cut
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, samples).astype(int) + 2, 400)
    known = Lengths(samples, int(lengths.sum()), int(lengths.sum()), int(lengths.max()), 0, 0)
    estimate = with_lengths(replace(SMALL, **options), known, known, DistillArgs())
    most = largest_micro_batch(lengths, replace(SMALL, **options))
    assert not estimate.is_assumed
    assert most <= math.prod(estimate.shape) <= (1.0 if samples == 300 else 1.6) * max(most, 1) * 1.25


def test_a_student_that_answers_itself_makes_samples_of_prompt_and_answer():
    known = Lengths(100, 10_000, 5_000, 300, 40, 45)
    estimate = replace(SMALL, on_policy_prompts=9)
    for share, tokens, longest in ((0.5, 64, 300), (1.0, 64, 104), (1.0, 3, 45), (1.0, 1000, 512)):
        found = with_lengths(estimate, known, known, DistillArgs(on_policy=share, on_policy_tokens=tokens))
        assert (found.sequence_length, found.prompt_length) == (longest, 40)
        assert found.answered_length == min(512, 40 + tokens)
        # validation reads recorded responses
        assert ("validation" in [moment.name for moment in found.moments]) == (longest < 300)
    assert with_lengths(replace(estimate, teacher_role="fill"), known, known, DistillArgs()).sequence_length == 300


def write_records(path: Path, count: int = 24, longest: int = 40) -> Path:
    rows = [{"instruction": f"count to {n}", "output": "one " * (1 + n * longest // count)} for n in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def dry_run(student_dir, teacher_dir, tmp_path, capsys, monkeypatch):
    """Calls the command with changes of its options; what it prints, in lines of at most 80 columns."""
    # nothing is written anywhere below it
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(data: DataModule | None, student: Path = student_dir, its_teacher: Path = teacher_dir, **options) -> str:
        options = {"train": train_args(), "optimizer": "AdamW", **options}
        try:
            setup(student, teacher_checkpoint_dir=its_teacher, data=data, dry_run=True, **options)
        finally:
            assert list(place.iterdir()) == []
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 80
        return " ".join(printed.split())

    return run


def streaming(path: Path, **options) -> StreamingSFT:
    options = {"mask_prompt": True, "prompt_style": Default(), "val_split_fraction": 0.25, **options}
    return StreamingSFT(str(path), cache_dir=Path("prepared"), **options)


def test_a_dry_run_says_how_long_the_longest_is(dry_run, alice_json, tmp_path):
    printed = dry_run(alice(alice_json))
    longest = int(
        re.search(r"Data: [\d,]+ training and \d+ validation samples of [\d,]+ tokens, the longest of (\d+);", printed)[
            1
        ]
    )
    assert 64 < longest <= 128 and f"the longest micro-batch is of 4 x {longest} tokens." in printed
    assert "Predicted memory of the process" in printed
    assert "Texts: prompt style Default, prompts masked." in printed
    training, train = int(re.search(r"Data: (\d+) training", printed)[1]), train_args(max_steps=None, epochs=3)
    length = f"Length: {3 * -(-training // train.global_batch_size)} steps of 8 records, 3 epochs."
    assert length in dry_run(alice(alice_json), train=train)
    data = streaming(write_records(tmp_path / "data.jsonl"))
    assert "Texts: prompt style Phi2, prompts count too." in dry_run(
        replace(data, prompt_style=Phi2(), mask_prompt=False)
    )
    printed = dry_run(data, train=train_args(max_seq_length=50))
    assert re.search(
        r"Data: \d+ training and \d+ validation samples of \d+ tokens, the longest of \d+; all were", printed
    )
    # with few records a step has no more than these
    few = streaming(write_records(tmp_path / "few.jsonl", 3), val_split_fraction=0.0)
    assert re.search(r"the longest micro-batch is of 3 x \d+ tokens", dry_run(few))


def test_what_of_a_run_a_dry_run_knows(dry_run, tmp_path):
    data = streaming(write_records(tmp_path / "data.jsonl"))
    plain = dry_run(data)
    sizes = {"plain": float(re.search(r"together (\d+\.\d+)", plain)[1])}
    for name, options in {
        "LoRA": {"lora": LoRAArgs(r=4)},
        "on-policy": {"distill": DistillArgs(on_policy=1.0, on_policy_tokens=2)},
        "fill": {"teacher": TeacherArgs(cache_dir="cache", cache_mode="fill")},
        "cached": {"teacher": TeacherArgs(cache_dir="cache")},
        "read": {"teacher": TeacherArgs(cache_dir="cache", cache_mode="read")},
    }.items():
        printed = dry_run(data, **options)
        sizes[name] = float(re.search(r"together (\d+\.\d+)", printed)[1])
        if "teacher" in options:
            tokens = int(re.search(r"in all, 512 bytes for each of ([\d,]+) response tokens", printed)[1])
            # with the LM head, of 1,024 ids and 128 numbers each
            assert f"Teacher cache cache: {readable(tokens * 512 + 1024 * 128 * 4)} in all" in printed
    assert sizes["on-policy"] < sizes["plain"] and sizes["fill"] < sizes["read"] < sizes["plain"] == sizes["cached"]


def test_prompts_alone_are_answered(dry_run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"instruction": "{"count " * (1 + n)}"}}\n' for n in range(20)))
    distill = DistillArgs(on_policy=1.0, on_policy_tokens=10)
    printed = dry_run(streaming(path, val_split_fraction=0.0), distill=distill)
    longest = int(re.search(r"the longest of (\d+); all were encoded", printed)[1])
    assert f"the longest micro-batch is of 4 x {longest + 10} tokens" in printed


class Unknown(DataModule):
    """A user's own."""


def test_where_the_data_is_not_known_the_assumption_is_named(dry_run, tmp_path):
    way_out = " Say by --train.max_seq_length how long they are at most."
    for given, why in (
        (None, "no --data is given."),
        (Alpaca(), "the records of --data Alpaca are fetched by the run."),
        (Unknown(), "the records of --data Unknown are fetched by the run."),
        (streaming("https://example.com/data.jsonl"), "https://example.com/data.jsonl is not on this machine's disks."),
        (LitData(data_path="nowhere"), "LitData's blocks all have as many."),
    ):
        assert f"Data: each sample is taken for 128 tokens, since {why}{way_out}" in dry_run(given)
    train = train_args(max_seq_length=64)
    assert "taken for 64 tokens, since" in (printed := dry_run(None, train=train)) and "Say by" not in printed
    data = streaming(write_records(tmp_path / "data.jsonl"))
    with pytest.raises(UserError, match=r"needs .* GB on each GPU .*\nIt would fit with --train.max_seq_length \d+"):
        dry_run(data, Path("pythia-14m"), Path("pythia-31m"), device_memory=0.7)


def test_what_the_run_would_refuse_a_dry_run_refuses(dry_run, tmp_path):
    path = write_records(tmp_path / "data.jsonl", longest=400)
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        dry_run(streaming(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"data.jsonl, line \d+: has \d+ tokens; the pair reads 128"):
        dry_run(streaming(path, too_long="error"))
    assert "the longest of" in dry_run(streaming(path))
