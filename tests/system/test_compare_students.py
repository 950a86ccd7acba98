"""scripts/experiments/compare_students.py, from end to end on a tiny teacher: what it finds, and that it goes on."""

import json

import compare_students
import pytest
from helpers.runs import evaluate

from litgpt_akl.config.args import GenerationArgs

TASK = {
    "task": "words",
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def words(teacher_dir, short, tmp_path) -> list[str]:
    questions = [{"text": "Off with", "choices": ["her head", "it all"], "answer": number % 2} for number in range(6)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, questions)))
    content = TASK | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "words.jsonl")}}}
    (tmp_path / "words.yaml").write_text(json.dumps(content))
    options = ["--teacher", teacher_dir, "--data", short.json_path, "--prompt_style", ""]
    options += ["--tasks", tmp_path / "words.yaml", "--task_limit", 4, "--out", tmp_path / "out", "--shares", 0.7]
    options += ["--steps", 0, 2, "--seeds", 1, 2, "--records", 6, "--kl_records", 2, "--candidates", 3]
    return [*map(str, options), "--trial_steps", "0", "--held_out", "7"]


@pytest.mark.slow  # six trainings
def test_students_are_compared_and_what_is_finished_is_kept(words, teacher_dir, short, tmp_path, monkeypatch):
    compare_students.compare(compare_students.parse(words))
    results = json.loads((tmp_path / "out" / "students.json").read_text())
    assert len(results) == 1 + 3 + 6 and results["teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    for method in compare_students.METHODS:
        found, student = results[f"{method} 0.7 0 None"], tmp_path / "out" / "students" / f"{method}-0.7"
        options = {"generation": GenerationArgs(seeds=[]), "tasks": str(tmp_path / "words.yaml"), "task_limit": 4}
        whole = evaluate(student, teacher_dir, short, tmp_path / method, **options)
        for name in ("forward_kl", "agreement"):
            assert found[name] == pytest.approx(whole["student"][name], rel=1e-5)
        assert found["accuracy"] == whole["tasks"]["mean"]["student"]["accuracy"]
        assert found["stderr"] == whole["tasks"]["mean"]["student"]["stderr"]
        one, other = (results[f"{method} 0.7 2 {seed}"]["forward_kl"] for seed in (1, 2))
        assert one != other and max(one, other) != found["forward_kl"]
        assert found["parameters"] <= 0.7 * results["teacher"]["parameters"]
    table = (tmp_path / "out" / "students.md").read_text()
    assert len(table.splitlines()) == 2 + 1 + 6 and " ± " in table
    assert (tmp_path / "out" / "students.png").stat().st_size > 10_000
    # what is missing is done again, and nothing else
    lost = results.pop("depth 0.7 2 2")
    (tmp_path / "out" / "students.json").write_text(json.dumps(results))
    done = []
    train = compare_students.train
    monkeypatch.setattr(compare_students, "train", lambda *args: done.append(args[2:]) or train(*args))
    compare_students.compare(compare_students.parse(words))
    again = json.loads((tmp_path / "out" / "students.json").read_text())
    assert done == [(2, 2)]
    assert again["depth 0.7 2 2"]["forward_kl"] == pytest.approx(lost["forward_kl"], rel=1e-6)
    assert {name: again[name] for name in results} == results
