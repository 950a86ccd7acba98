"""Tasks of lm-eval: what it finds through our models is what it finds through Transformers' on an export."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.ranks import in_processes
from helpers.runs import evaluate

from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.messages import UserError
from litgpt_akl.training.task_accuracy import main_metric, recovered, summary, task_table

QUESTIONS = [
    ("Alice was beginning to get very tired of", ["sitting by her sister", "the", "a hookah", "sleeping"]),
    ("The Queen", ["of Hearts, she made some tarts", "said", "was a", "off"]),
    ("Off with", ["her head!", "the cat", "it all the same", "no"]),
    ("Down the", ["rabbit-hole", "well", "sea and the shore " * 4, "hall"]),
    ("The Mock Turtle", ["sighed deeply", "went", "in", "began again"]),
    ("", ["Alice", "Queen", "Hatter", "Dormouse"]),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """Three tasks of each kind of request, with a prompt that no context of 128 tokens holds among them."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [{"text": text, "choices": some, "answer": place % 4} for place, (text, some) in enumerate(QUESTIONS)]
    docs.append({"text": "It was a long tale. " * 40, "choices": ["yes", "no", "so", "it is"], "answer": 1})
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score", "higher_is_better": False}]
    content = {
        "choices": {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics},
        "rolling": {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "byte_perplexity"}]},
        "answers": {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}, {"metric": "chrf"}]},
    }
    content["choices"]["doc_to_target"] = "answer"
    content["rolling"] |= {"doc_to_target": "{{text + choices[0]}}", "doc_to_text": ""}
    content["answers"] |= {
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 9, "do_sample": False},
    }
    for name, entries in content.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | entries))
    return ",".join(str(folder / f"{name}.yaml") for name in content)


@pytest.fixture(scope="module")
def pair(student_dir, teacher_dir, tmp_path_factory) -> dict[str, Path]:
    """The student, and a teacher whose name makes LitGPT begin texts with a BOS token, as both then do."""
    folder = tmp_path_factory.mktemp("pair")
    pair = {"student": folder / "Llama-3-student", "teacher": folder / "Llama-3-teacher"}
    for role, source in (("student", student_dir), ("teacher", teacher_dir)):
        shutil.copytree(source, pair[role])
        export_hf(pair[role], folder / f"{role}-hf")
    return pair


def of_transformers(folder: Path, tasks: str, limit: int | None = None) -> dict[str, dict[str, float]]:
    """What lm-eval finds by its own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, max_length=128)
    found = simple_evaluate(model, tasks=tasks.split(","), limit=limit, bootstrap_iters=1000)["results"]
    return {name: {key: value for key, value in of.items() if "," in key} for name, of in found.items()}


def check_equal(found: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]]) -> None:
    assert found.keys() == wanted.keys()
    for task, metrics in wanted.items():
        for name, value in metrics.items():
            ours = found[task].get(name.removesuffix(",none"))
            assert ours == (None if value == "N/A" else pytest.approx(value, rel=1e-4)), (task, name)


@pytest.fixture(scope="module")
def found(pair, tasks, tmp_path_factory) -> dict:
    out_dir = tmp_path_factory.mktemp("out")
    options = {"tasks": tasks, "before_checkpoint_dir": pair["student"]}
    return evaluate(pair["student"], pair["teacher"], None, out_dir, batch_size=3, **options)


@pytest.mark.parametrize("role", [pytest.param("student", marks=pytest.mark.slow), "teacher"])
def test_metrics_are_those_of_transformers(found, pair, tasks, role):
    check_equal(found["tasks"]["metrics"][role], of_transformers(pair[role].parent / f"{role}-hf", tasks))


def test_what_is_told_of_them(found, pair, tasks, tmp_path, capsys):
    again = evaluate(pair["student"], pair["teacher"], None, tmp_path, batch_size=1, tasks=tasks, task_limit=5)
    out = capsys.readouterr().out
    assert again["tasks"]["chance"] == found["tasks"]["chance"] == {"choices": 0.25}
    assert again["settings"]["task_limit"] == 5 and again["data"]["records"] == 0
    assert again["tasks"]["metrics"].keys() == {"student", "teacher"}
    assert found["tasks"]["metrics"]["before"] == found["tasks"]["metrics"]["student"]
    lines = [line for line in out.splitlines() if line.startswith(("choices", "rolling", "answers"))]
    assert [line.split()[:2] for line in lines] == [
        ["choices", "acc"],
        ["choices", "acc_norm"],
        ["choices", "brier_score"],
        ["rolling", "byte_perplexity"],
        ["answers", "exact_match"],
        ["answers", "chrf"],
    ]
    assert max(map(len, out.splitlines())) <= 80 or str(tmp_path) in out
    value = again["tasks"]["metrics"]["student"]["choices"]
    assert f"{value['acc']:.3f} ±{value['acc_stderr']:.3f}" in lines[0]


def test_long_prompts_are_counted(pair, tasks, tmp_path, capsys):
    evaluate(pair["teacher"], pair["teacher"], None, tmp_path, tasks=tasks)
    # four choices of one question, and its text for an answer; windows of a text are no cuts
    assert "teacher: 5 prompts of tasks lost their begin beyond 128 tokens" in capsys.readouterr().out


def test_two_processes_find_the_same(found, pair, tasks, tmp_path):
    in_processes(2, evaluate_in_processes, pair, tasks, tmp_path)
    again = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    for role in ("before", "student", "teacher"):
        for task, metrics in found["tasks"]["metrics"][role].items():
            assert again["metrics"][role][task] == pytest.approx(metrics, rel=1e-5)


def evaluate_in_processes(pair: dict[str, Path], tasks: str, out_dir: Path) -> None:
    torch.set_num_threads(1)
    evaluate_akl(
        pair["student"],
        teacher_checkpoint_dir=pair["teacher"],
        before_checkpoint_dir=pair["student"],
        out_dir=out_dir,
        tasks=tasks,
        batch_size=2,
        devices=2,
    )


def test_a_task_that_samples_changes_no_greedy_answer(found, pair, tasks, tmp_path):
    greedy = tasks.split(",")[-1]
    content = json.loads(Path(greedy).read_text())
    content["generation_kwargs"] |= {"do_sample": True, "temperature": 1.5}
    sampled = tmp_path / "sampled.yaml"
    sampled.write_text(json.dumps(content | {"task": "sampled"}))
    both = f"{sampled},{greedy}"
    again = evaluate(pair["student"], pair["teacher"], None, tmp_path / "out", batch_size=5, tasks=both)
    for role in ("student", "teacher"):
        metrics = again["tasks"]["metrics"][role]
        assert metrics["answers"] == pytest.approx(found["tasks"]["metrics"][role]["answers"], rel=1e-4)
        assert metrics["sampled"] != metrics["answers"]


def test_records_and_tasks_in_one_evaluation(pair, tasks, alice_json, tmp_path):
    none = GenerationArgs(seeds=[])
    both = evaluate(pair["student"], pair["teacher"], alice_json, tmp_path, tasks=tasks, generation=none)
    assert both["student"]["forward_kl"] > 0 and both["tasks"]["metrics"]["student"]["choices"]["acc"] >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"tasks": "arc_eazy"},
            "--tasks arc_eazy: lm-eval has no such task.*\nDid you mean arc_easy?",
            marks=pytest.mark.slow,  # lm-eval looks through its own tasks for seconds
        ),
        ({"tasks": "nothing.yaml"}, "--tasks nothing.yaml: its questions cannot be read"),
        ({"task_limit": 3}, "--task_limit 3 has no effect without --tasks"),
        ({"tasks": "arc_easy", "task_limit": 0}, "--task_limit must be at least 1, got 0"),
    ],
)
def test_mistakes(pair, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(pair["student"], pair["teacher"], None, tmp_path, **options)


def test_shares_of_the_teacher():
    assert recovered(0.5, 0.75, 0.25) == 0.5 and math.isnan(recovered(0.5, 0.25, 0.25))
    assert main_metric({"acc": 0.1, "acc_norm": 0.2}) == "acc_norm" and main_metric({"f1": 0.1}) == "f1"
    found = {
        "student": {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc": 0.6, "acc_stderr": 0.04}},
        "teacher": {"a": {"acc": 0.7, "acc_stderr": 0.03}, "b": {"acc": 0.8, "acc_stderr": 0.04}},
    }
    means = summary(found, {"a": 0.25, "b": 0.5})
    assert means["student"] == pytest.approx({"accuracy": 0.55, "stderr": 0.025, "recovered": 0.175 / 0.375})
    assert task_table(found, {"a": 0.25, "b": 0.5}).splitlines()[-1].split()[-1] == "47%"
