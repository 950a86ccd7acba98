"""Answers in batches are those of a slow, obvious loop, and are drawn from the model's own distribution."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import families
from helpers.generation import VOCAB, slow_answer
from helpers.ranks import in_processes
from litgpt.generate.base import generate as litgpt_generate
from litgpt.generate.base import sample
from litgpt.model import GPT
from litgpt.prompts import Default, Phi1
from litgpt.tokenizer import Tokenizer
from litgpt.utils import load_checkpoint
from transformers import NoRepeatNGramLogitsProcessor

from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import _Answer, _choose, generate, stop_sequences, without_end
from litgpt_akl.models.gpt import load_frozen
from litgpt_akl.models.parallel import make_strategy
from litgpt_akl.models.weights import read_config


@pytest.fixture(scope="module")
def fabric() -> L.Fabric:
    return L.Fabric(devices=1, accelerator="cpu")


def load(fabric: L.Fabric, directory: Path) -> GPT:
    return load_frozen(fabric, directory, read_config(directory), torch.float32)


@pytest.fixture(scope="module")
def teacher(fabric, teacher_dir) -> GPT:
    return load(fabric, teacher_dir)


def prompts(number: int, longest: int = 30, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=random).tolist()
    return [torch.randint(VOCAB, (length,), generator=random) for length in lengths]


def in_batches(fabric, model, questions, size, seeds=None, **options) -> list[list[int]]:
    options = {"max_new_tokens": 20, "stop": [], "vocab_size": VOCAB, **options}
    answers = []
    for start in range(0, len(questions), size):
        part = slice(start, start + size)
        own = None if seeds is None else seeds[part]
        answers += generate(fabric, model, questions[part], seeds=own, **options)
    return answers


@pytest.mark.parametrize("name", families.FAMILIES)
def test_batches_answer_as_the_whole_text_through_the_model_does(fabric, tmp_path, name):
    families.write_family(name, tmp_path / name, tied=True)
    model = load(fabric, tmp_path / name)
    # Gemma's windows are of 16 tokens here: answers go on beyond them
    questions = prompts(9, longest=16)
    wanted = [slow_answer(model, prompt, 12) for prompt in questions]
    if model.config.sliding_window_size is not None:
        # LitGPT's model without a cache sees the window, with it all that the cache holds
        wanted = [answer[: 16 - len(prompt)] for answer, prompt in zip(wanted, questions, strict=True)]
    for size in (1, 4, 9):
        found = in_batches(fabric, model, questions, size, max_new_tokens=12)
        assert [answer[: len(w)] for answer, w in zip(found, wanted, strict=True)] == wanted
        assert {len(answer) for answer in found} == {12}


@pytest.mark.parametrize("top_k", [None, 1, 7, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.3, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_drawn_is_what_litgpt_draws(top_k, top_p, temperature):
    logits = 3 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0))
    # several ids are as probable as the last of the most probable
    logits[10:] = logits[10:].round()
    wanted = []
    with torch.random.fork_rng():
        for number, row in enumerate(logits):
            torch.manual_seed(number)
            wanted.append(sample(row[None, None], temperature, top_k, top_p).item())
    generators = [torch.Generator().manual_seed(number) for number in range(20)]
    assert _choose(logits, [[]] * 20, generators, temperature, top_k, top_p) == wanted


def test_greedy_answers_are_those_of_litgpt_and_of_any_batch(fabric, teacher, teacher_dir):
    questions = prompts(16)
    tokenizer = Tokenizer(teacher_dir)
    model = GPT(read_config(teacher_dir))
    load_checkpoint(fabric, model, teacher_dir / "lit_model.pth")
    wanted = []
    for prompt in questions:
        model.set_kv_cache(batch_size=1)
        longest = len(prompt) + 50
        output = litgpt_generate(model.eval(), prompt, longest, temperature=0.0, eos_id=tokenizer.eos_id)
        wanted.append(output[len(prompt) :].tolist())
    ends = [[tokenizer.eos_id]]
    for size in (1, 5, 16):
        found = in_batches(fabric, teacher, questions, size, max_new_tokens=50, stop=ends)
        assert [without_end(answer, ends) for answer in found] == [without_end(answer, ends) for answer in wanted]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(fabric, teacher):
    questions, seeds = prompts(16), [(7, number) for number in range(16)]
    wanted = in_batches(fabric, teacher, questions, 1, seeds, no_repeat_ngram=2)
    for size in (3, 16):
        assert in_batches(fabric, teacher, questions, size, seeds, no_repeat_ngram=2) == wanted
    before = torch.get_rng_state()
    other = in_batches(fabric, teacher, questions, 16, [(8, number) for number in range(16)], no_repeat_ngram=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(first != second for first, second in zip(other, wanted, strict=True))


@pytest.mark.parametrize(("size", "draws"), [(1, 600), (16, 3200)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ids_are_drawn_as_often_as_they_are_probable(fabric, student_dir, size, draws, temperature):
    """Chi-square of draws among 12 ids, with fixed seeds: others are beyond the limit once in a thousand times."""
    model, vocab = load(fabric, student_dir), 12
    with torch.no_grad():
        model.lm_head.weight[:vocab] *= 2
        logits = model(torch.tensor([[300, 500]]))[0, -1, :vocab]
    expected = draws * torch.softmax(logits.double() / temperature, dim=-1)
    assert expected.min() > 5 and expected.max() > 2 * expected.min()
    answers = in_batches(
        fabric,
        model,
        [torch.tensor([300, 500])] * draws,
        size,
        [(1, number) for number in range(draws)],
        max_new_tokens=1,
        vocab_size=vocab,
        temperature=temperature,
    )
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=vocab)
    statistic = ((counts - expected).square() / expected).sum()
    tail = 1 - torch.special.gammainc(torch.tensor((vocab - 1) / 2).double(), statistic / 2)
    assert tail > 1e-3


def test_no_sequence_of_ids_comes_twice(fabric, teacher):
    questions = [prompt % 50 for prompt in prompts(6, longest=40)]
    plain = in_batches(fabric, teacher, questions, 6, max_new_tokens=60)
    found = in_batches(fabric, teacher, questions, 6, max_new_tokens=60, no_repeat_ngram=3)

    def repeats(prompt, answer):
        text = prompt.tolist() + answer
        triples = [tuple(text[start : start + 3]) for start in range(len(text) - 2)]
        return len(triples) - len(set(triples))

    in_prompts = sum(repeats(prompt, []) for prompt in questions)
    assert sum(map(repeats, questions, plain)) > in_prompts + 20
    assert sum(map(repeats, questions, found)) == in_prompts


@pytest.mark.parametrize("size", [1, 2, 6])
def test_what_would_repeat_is_what_transformers_says(size):
    texts = torch.randint(4, (20, 60), generator=torch.Generator().manual_seed(size))
    banned = NoRepeatNGramLogitsProcessor(size)
    for text in texts:
        answer = _Answer(text[:10].tolist(), 100, [], size)
        for end in range(10, 60):
            scores = banned(text[None, :end], torch.zeros(1, 4))[0]
            assert set(answer.forbidden()) == set(scores.isinf().nonzero()[:, 0].tolist())
            answer.append(text[end].item())


def test_an_answer_ends_with_its_stop_sequence_or_the_context(fabric, teacher):
    question = prompts(1)[0]
    answer = in_batches(fabric, teacher, [question], 1, max_new_tokens=30)[0]
    cut = in_batches(fabric, teacher, [question], 1, max_new_tokens=30, stop=[answer[4:6], [VOCAB]])[0]
    assert cut == answer[:6] and without_end(cut, [[VOCAB], answer[4:6]]) == answer[:4]
    long = torch.arange(120)
    context = teacher.config.block_size
    assert len(in_batches(fabric, teacher, [long, question], 2, max_new_tokens=30)[0]) == context - 120
    assert teacher.max_seq_length == context and teacher.mask_cache is None
    with pytest.raises(UserError, match="A prompt has 128 tokens.* has 127"):
        in_batches(fabric, teacher, [torch.arange(128)], 1)


def test_stop_sequences_of_styles(teacher_dir):
    tokenizer = Tokenizer(teacher_dir)
    assert stop_sequences(tokenizer, None) == stop_sequences(tokenizer, Default()) == [[tokenizer.eos_id]]
    # "Answer" is no token here
    assert stop_sequences(tokenizer, Phi1()) == [[tokenizer.eos_id]]
    assert stop_sequences(tokenizer, TwoEnds()) == [[tokenizer.eos_id], [5, 6]]


class TwoEnds(Default):
    def stop_tokens(self, tokenizer):
        return ([5, 6], [tokenizer.eos_id], [5, 6])


def answer_in_processes(directory: Path, output: Path) -> None:
    torch.set_num_threads(1)
    fabric = L.Fabric(devices=2, accelerator="cpu", strategy=make_strategy(2, 1, False))
    fabric.launch()
    model = load(fabric, directory)
    # one process has five prompts, the other two short ones, and then none at all
    for turn, sizes in enumerate(((5, 2), (3, 0))):
        questions = prompts(7)[: sizes[0]] if fabric.global_rank == 0 else prompts(7)[7 - sizes[1] :]
        seeds = [(len(question),) for question in questions]
        found = in_batches(
            fabric, model, questions, max(1, len(questions)), seeds, max_new_tokens=10 + fabric.global_rank
        )
        if not questions:
            found = generate(fabric, model, [], max_new_tokens=9, stop=[], vocab_size=VOCAB)
        torch.save(found, output / f"{turn}-{fabric.global_rank}.pt")


def test_processes_answer_their_own_prompts_together(fabric, teacher, teacher_dir, tmp_path):
    in_processes(2, answer_in_processes, teacher_dir, tmp_path)
    ask = partial(in_batches, fabric, teacher)
    for name, questions, tokens in (
        ("0-0", prompts(7)[:5], 10),
        ("0-1", prompts(7)[5:], 11),
        ("1-0", prompts(7)[:3], 10),
        ("1-1", [], 11),
    ):
        wanted = ask(questions, 1, [(len(question),) for question in questions], max_new_tokens=tokens)
        assert torch.load(tmp_path / f"{name}.pt") == wanted
