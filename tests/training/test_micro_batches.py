"""No forward of either model takes more samples or tokens together than a run was told, whatever it is made for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.cache_runs import RATE, assert_equal, fill, run
from helpers.runs import distil, evaluate, metrics
from litgpt.model import GPT
from litgpt.prompts import Default

from litgpt_akl.config.args import GenerationArgs, TeacherArgs
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.messages import UserError

TOKENS = (130, 260)
"""Of a micro-batch: of the longest samples one, or two."""


@pytest.fixture
def streamed(short, tmp_path):
    """The records of ``short``, in micro-batches of so many tokens."""

    def make(micro_batch_tokens: int | None) -> StreamingSFT:
        train, val = (str(short.json_path / f"{name}.json") for name in ("train", "val"))
        options = {"mask_prompt": True, "prompt_style": Default(), "num_workers": 0, "num_proc": 1}
        cache_dir = tmp_path / "prepared"
        return StreamingSFT(train, val_path=val, micro_batch_tokens=micro_batch_tokens, cache_dir=cache_dir, **options)

    return make


@contextmanager
def forwards() -> Iterator[list[torch.Size]]:
    """The shapes ``[batch, time]`` of the ids that models read meanwhile."""
    shapes = []

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, GPT):
            shapes.append(inputs[0].shape)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield shapes
    finally:
        hook.remove()


def test_weights_within_a_sequence_do_not_depend_on_micro_batches(student_dir, teacher_dir, short, tmp_path):
    found = []
    for size in (1, 4):
        optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
        options = {"train": {"micro_batch_size": size, "max_steps": 2}, "distill": {"divergence": "tad"}}
        options["optimizer"] = optimizer
        found.append(distil(student_dir, teacher_dir, short, tmp_path / str(size), **options))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-6)


def train_on_policy(student: Path, teacher: Path, data: StreamingSFT, out_dir: Path) -> dict:
    """Steps, validations, examples, and what the student answers itself."""
    torch.set_num_threads(1)
    distill = {"on_policy": 0.5, "on_policy_tokens": 6}
    options = {"distill": distill, "eval": {"interval": 2, "max_new_tokens": 4}, "train": {"max_steps": 3}}
    return run(student, teacher, data, out_dir, **options)


def train_from_cache(student: Path, teacher: Path, data: StreamingSFT, out_dir: Path) -> dict:
    cache = out_dir.with_suffix(".cache")
    fill(student, teacher, data, out_dir, cache, dtype="fp8")
    options = {"eval": {"max_new_tokens": 4}, "train": {"max_steps": 3}}
    return run(student, teacher, data, out_dir, cache, mode="auto", dtype="fp8", **options)


def train_quantized(student: Path, teacher: Path, data: StreamingSFT, out_dir: Path) -> dict:
    return distil(student, teacher, data, out_dir, teacher=TeacherArgs(quantize="nf4"), optimizer=RATE)


@pytest.mark.parametrize("train", [train_on_policy, train_from_cache, train_quantized])
def test_in_a_run(student_dir, teacher_dir, streamed, tmp_path, train):
    found = {}
    for tokens in TOKENS:
        with forwards() as shapes:
            weights = train(student_dir, teacher_dir, streamed(tokens), tmp_path / str(tokens))
        together = [shape.numel() for shape in shapes if shape[0] > 1]
        assert together and max(together) <= tokens
        found[tokens] = weights, [row["val_loss"] for row in metrics(tmp_path / str(tokens)) if "val_loss" in row]
    (first, losses), (second, others) = found.values()
    assert_equal(first, second, within=1e-5)
    assert losses == pytest.approx(others, rel=1e-5) and len(losses) > 1


def test_without_tokens_samples_count(student_dir, teacher_dir, streamed, tmp_path):
    data = streamed(None)
    for size in (2, 3):
        with forwards() as shapes:
            run(student_dir, teacher_dir, data, tmp_path / str(size), train={"micro_batch_size": size, "max_steps": 1})
        assert max(shape[0] for shape in shapes) == size


def test_in_an_evaluation(student_dir, teacher_dir, streamed, tmp_path):
    generation = GenerationArgs(seeds=[10], max_new_tokens=6, batch_size=5)
    evaluate_it = partial(evaluate, student_dir, teacher_dir, generation=generation, batch_size=4)
    expected = evaluate_it(streamed(None), tmp_path / "none")
    for tokens in TOKENS:
        with forwards() as shapes:
            found = evaluate_it(streamed(tokens), tmp_path / str(tokens))
        together = [shape.numel() for shape in shapes if shape[0] > 1]
        assert together and max(together) <= tokens
        for role in ("student", "teacher"):
            counted = {name: value for name, value in expected[role].items() if value is not None}
            assert {name: found[role][name] for name in counted} == pytest.approx(counted, rel=1e-5)


def test_a_validation_sample_that_does_not_fit_is_refused(student_dir, teacher_dir, streamed, tmp_path):
    data = streamed(60)
    short_ones = [{"instruction": "a", "output": "b"}] * 4
    data.path = str(tmp_path / "short.json")
    Path(data.path).write_text(json.dumps(short_ones))
    with pytest.raises(UserError, match=r"micro_batch_tokens 60 is less than the \d\d+ tokens of the longest sample"):
        run(student_dir, teacher_dir, data, tmp_path / "run")
