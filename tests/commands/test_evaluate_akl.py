"""The evaluation command: what it says of a student that is its teacher, and of one that is not."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.generation import slow_answer
from helpers.ranks import in_processes
from helpers.runs import FEW, alice, evaluate
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config
from rouge_score.rouge_scorer import RougeScorer

from litgpt_akl.commands.evaluate_akl import evaluate_akl, table
from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.messages import UserError
from litgpt_akl.models.gpt import build_model
from litgpt_akl.models.weights import open_weights, read_config
from litgpt_akl.training.responses import Question, Responses, distinct_pairs, find_questions, rate
from litgpt_akl.training.validation import expected_calibration_error


def answers_in(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def found(student_dir, teacher_dir, alice_json, tmp_path_factory) -> tuple[dict, Path]:
    """Of a random student."""
    out_dir = tmp_path_factory.mktemp("evaluated")
    return evaluate(student_dir, teacher_dir, alice_json, out_dir), out_dir


def test_a_student_that_is_its_teacher(teacher_dir, student_dir, alice_json, tmp_path, capsys):
    found = evaluate(teacher_dir, teacher_dir, alice_json, tmp_path, before_checkpoint_dir=student_dir)
    student, teacher = found["student"], found["teacher"]
    assert [student[name] for name in ("forward_kl", "reverse_kl", "adaptive_kl")] == [0, 0, 0]
    assert student["agreement"] == student["gap_closed"] == student["kl_closed"] == 1
    assert all(student[name] == value for name, value in teacher.items())
    assert found["before"]["forward_kl"] > 1 and found["before"]["cross_entropy"] > teacher["cross_entropy"] + 1
    assert all(each["answers"]["student"] == each["answers"]["teacher"] for each in answers_in(tmp_path))
    out = capsys.readouterr().out
    assert "7 records" in out and "100.0%" in out and str(tmp_path) in out


def test_measures_equal_those_of_logits(found, student_dir, teacher_dir, alice_json):
    """Every sample alone through LitGPT's models, float64 from the logits on."""
    dataset = prepare_datasets(alice(alice_json), Tokenizer(teacher_dir), train_args(), 128, student_dir)[1]
    models = [whole_model(directory) for directory in (student_dir, teacher_dir)]
    columns = []
    for sample in dataset.read(range(7)):
        labels = sample["labels"][1:]
        kept = labels != -100
        with torch.no_grad():
            logits = [model(sample["input_ids"][None])[0, :-1, :1024][kept].double() for model in models]
        log_q, log_p = (x.log_softmax(-1) for x in logits)
        of_label = [x.gather(-1, labels[kept, None])[:, 0] for x in (log_q, log_p)]
        confidence, top = log_q.exp().max(-1)
        columns.append(
            torch.stack(
                [
                    -of_label[0],
                    -of_label[1],
                    (log_p.exp() * (log_p - log_q)).sum(-1),
                    (log_q.exp() * (log_q - log_p)).sum(-1),
                    (top == log_p.argmax(-1)).double(),
                    (top == labels[kept]).double(),
                    confidence,
                ]
            )
        )
    values = torch.cat(columns, dim=1)
    names = ("cross_entropy", "", "forward_kl", "reverse_kl", "agreement", "accuracy")
    for name, mean in zip(names, values.mean(dim=1).tolist(), strict=False):
        if name:
            assert found[0]["student"][name] == pytest.approx(mean, rel=1e-5, abs=1e-9), name
    assert found[0]["teacher"]["cross_entropy"] == pytest.approx(values[1].mean().item(), rel=1e-5)
    assert found[0]["teacher"]["perplexity"] == pytest.approx(math.exp(values[1].mean()), rel=1e-5)
    assert found[0]["student"]["calibration_error"] == pytest.approx(calibration_error(values[6], values[5]), rel=1e-5)


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    total = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            total += inside.sum().item() * abs(confidence[inside].mean() - correct[inside].mean()).item()
    return total / len(confidence)


def test_calibration_error_at_the_ends_of_bins():
    # a confidence of 1, which rounding often makes, is in the last bin with others, as an end is in the bin below it
    confidence = torch.tensor([1.0, 1.0, 0.95, 0.95, 1 / 15, 0.05], dtype=torch.float64)
    correct = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    last, first = abs(3 / 4 - (1 + 1 + 0.95 + 0.95) / 4), abs(1 / 2 - (1 / 15 + 0.05) / 2)
    expected = (4 * last + 2 * first) / 6
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64).sqrt()
    correct = (torch.rand(500, generator=generator) < 0.6).double()
    assert expected_calibration_error(confidence, correct) == pytest.approx(calibration_error(confidence, correct))
    # rounding in float32 goes beyond 1
    assert expected_calibration_error(torch.tensor([1.0000001]), torch.tensor([1.0])) < 1e-6


def whole_model(directory: Path):
    config = read_config(directory)
    model = build_model(config, tied=False).eval()
    model.load_state_dict(open_weights(directory, config))
    return model


def train_args() -> TrainArgs:
    return TrainArgs(micro_batch_size=4, max_seq_length=None)


def test_rouge_is_that_of_the_library_on_the_answers_that_were_written(found):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    content, out_dir = found
    lines = answers_in(out_dir)
    assert content["data"] == {"records": 7, "prompts": len(lines), "prompts_left_out": 0, "date": None}
    for role in ("student", "teacher"):
        by_seed = [
            sum(
                max(scorer.score(r, line["answers"][role][seed])["rougeL"].fmeasure for r in line["references"])
                for line in lines
            )
            / len(lines)
            for seed in ("10", "20")
        ]
        assert content[role]["rouge_l"] == pytest.approx(100 * sum(by_seed) / 2, rel=1e-9)
        assert content[role]["rouge_l_std"] == pytest.approx(100 * abs(by_seed[0] - by_seed[1]) / math.sqrt(2))
    assert content["teacher"]["rouge_l"] > 0


def test_the_best_of_several_references_counts():
    question = Question(0, torch.tensor([1]), ["nothing alike", "the cat was sitting there", "a dog"])
    responses = [Responses(1, ["the cats sat there"], [4], [True])]
    best = RougeScorer(["rougeL"], use_stemmer=True).score("the cat was sitting there", "the cats sat there")
    assert rate([question], responses)["rouge_l"] == 100 * best["rougeL"].fmeasure > 60
    assert math.isnan(rate([question], responses)["rouge_l_std"])


def test_distinct_pairs():
    # two different pairs of seven words; of the pairs themselves they would be half
    assert distinct_pairs(["a b a b", "a b", "c", ""]) == 2 / 7
    assert distinct_pairs(["a"]) == distinct_pairs([""]) == distinct_pairs([]) == 0
    # pairs do not reach from one response into the next
    texts = ["the cat sat on the cat", "on the mat the cat"]
    words = [text.split() for text in texts]
    pairs = {(each[n], each[n + 1]) for each in words for n in range(len(each) - 1)}
    assert distinct_pairs(texts) == len(pairs) / 11


def test_samples_with_one_prompt_are_one_question(teacher_dir, student_dir, tmp_path):
    tokenizer = Tokenizer(teacher_dir)
    records = [("Who was it?", "Alice"), ("What?", "a book"), ("Who was it?", "the Queen"), ("What?", "a hat")]
    data = write_records(tmp_path, records)
    dataset = prepare_datasets(data, tokenizer, train_args(), 128, student_dir)[1]
    questions = find_questions(dataset, range(len(dataset)), tokenizer, [[tokenizer.eos_id]])
    assert [question.number for question in questions] == [0, 1]
    assert [[r.strip() for r in question.references] for question in questions] == [
        ["Alice", "the Queen"],
        ["a book", "a hat"],
    ]
    assert tokenizer.decode(questions[0].prompt) == tokenizer.decode(tokenizer.encode("Who was it?"))


def write_records(folder: Path, records: list[tuple[str, str]], mask_prompt: bool = True) -> JSON:
    content = json.dumps([{"instruction": instruction, "output": output} for instruction, output in records])
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(content)
    return JSON(json_path=folder, mask_prompt=mask_prompt, prompt_style=Default(), num_workers=0)


def test_batches_change_nothing(found, student_dir, teacher_dir, alice_json, tmp_path):
    other = GenerationArgs(seeds=[10, 20], max_new_tokens=12, batch_size=1)
    again = evaluate(student_dir, teacher_dir, alice_json, tmp_path, generation=other, batch_size=1)
    assert answers_in(tmp_path) == answers_in(found[1])
    for role in ("student", "teacher"):
        assert again[role] == pytest.approx(found[0][role], rel=1e-5)


def test_two_processes_find_the_same(found, student_dir, teacher_dir, alice_json, tmp_path):
    in_processes(2, evaluate_in_processes, student_dir, teacher_dir, alice_json, tmp_path)
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert answers_in(tmp_path) == answers_in(found[1])
    for role in ("student", "teacher"):
        assert again[role] == pytest.approx(found[0][role], rel=1e-5)


def evaluate_in_processes(student: Path, teacher: Path, data: Path, out_dir: Path) -> None:
    torch.set_num_threads(1)
    evaluate_akl(
        student,
        teacher_checkpoint_dir=teacher,
        data=alice(data),
        out_dir=out_dir,
        max_records=7,
        generation=FEW,
        devices=2,
    )


def test_greedy_answers_are_given_once(teacher_dir, alice_json, tmp_path):
    greedy = GenerationArgs(temperature=0.0, no_repeat_ngram=None, max_new_tokens=8, max_prompts=2, teacher=False)
    found = evaluate(teacher_dir, teacher_dir, alice_json, tmp_path, generation=greedy)
    assert found["student"]["rouge_l_std"] is None and "rouge_l" not in found["teacher"]
    lines = answers_in(tmp_path)
    assert [list(line["answers"]["student"]) for line in lines] == [["10"], ["10"]]
    tokenizer, model = Tokenizer(teacher_dir), whole_model(teacher_dir)
    dataset = prepare_datasets(alice(alice_json), tokenizer, train_args(), 128, teacher_dir)[1]
    for line in lines:
        (question,) = find_questions(dataset, [line["number"]], tokenizer, [[tokenizer.eos_id]])
        wanted = slow_answer(model, question.prompt, 8, tokenizer.eos_id)
        assert line["answers"]["student"]["10"] == tokenizer.decode(torch.tensor(wanted))


def test_without_answers(teacher_dir, student_dir, alice_json, tmp_path):
    data = alice(alice_json)
    data.mask_prompt = False
    with pytest.raises(UserError, match="all of it counts as a response.*\n.*mask_prompt true"):
        evaluate(student_dir, teacher_dir, data, tmp_path)
    found = evaluate(student_dir, teacher_dir, data, tmp_path, generation=GenerationArgs(seeds=[]))
    assert "rouge_l" not in found["student"] and found["data"]["prompts"] == 0
    assert not (tmp_path / "answers.jsonl").exists()


def test_prompts_that_a_model_cannot_answer_are_left_out_and_counted(student_dir, teacher_dir, tmp_path, capsys):
    """LitGPT answers no prompt that is longer than a sliding window."""
    student = shutil.copytree(student_dir, tmp_path / "student")
    (student / "config.json").unlink()
    config = Config.from_file(student / "model_config.yaml")
    save_config(replace(config, sliding_window_size=16, sliding_window_indices=[1, 0]), student)
    records = [("Who was it?", "Alice"), ("Who was it then, and who was it before, and who not?", "The Queen")]
    data = write_records(tmp_path, records)
    found = evaluate(student, teacher_dir, data, tmp_path / "out")
    assert "1 of 2 prompts are left out of the answers: they are longer than the 16 tokens" in capsys.readouterr().out
    assert found["data"]["prompts"] == 1 and found["data"]["records"] == 2
    assert [line["number"] for line in answers_in(tmp_path / "out")] == [0]


def test_the_training_records_can_be_asked_for(student_dir, teacher_dir, tmp_path):
    records = [("Who was it?", "Alice")] * 3
    data = write_records(tmp_path, records)
    (tmp_path / "val.json").write_text("[]")
    none = GenerationArgs(seeds=[])
    with pytest.raises(UserError, match="--split validation: the data has no such records"):
        evaluate(student_dir, teacher_dir, data, tmp_path / "out", generation=none)
    found = evaluate(student_dir, teacher_dir, data, tmp_path / "out", generation=none, split="training")
    assert found["data"]["records"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_records": 0}, "--max_records must be at least 1, got 0"),
        ({"mu": 1.5}, "--mu must be above 0 and at most 1, got 1.5"),
        ({"before_checkpoint_dir": Path("nowhere")}, "nowhere"),
        ({"out_dir": Path(__file__)}, "cannot be made"),
    ],
)
def test_mistakes(student_dir, teacher_dir, alice_json, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(student_dir, teacher_dir, alice_json, **({"out_dir": tmp_path} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, r"--generation.seeds must be different numbers from 0 on, got \[1, 1\]"),
        ({"seeds": [-1]}, "--generation.seeds"),
        ({"max_new_tokens": 0}, "--generation.max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "--generation.temperature must not be negative"),
    ],
)
def test_mistakes_in_generation(changes, message):
    with pytest.raises(UserError, match=message):
        GenerationArgs(**changes)


def test_numbers_of_the_table_have_as_many_digits_as_say_something():
    text = table({"student": {"agreement": 0.37931, "perplexity": 4.2e5}, "teacher": {"perplexity": 88.514}})
    assert "37.9%" in text and "> 10,000" in text and text.endswith(" 88.51")


def test_the_table_leaves_out_what_was_not_measured():
    text = table({"student": {"forward_kl": 0.5, "gap_closed": math.nan}, "teacher": {"cross_entropy": 1.0}})
    assert text.splitlines()[0].split() == ["student", "teacher"]
    assert [line.split()[-1] for line in text.splitlines()[1:]] == ["0.5000", "1.0000"]
