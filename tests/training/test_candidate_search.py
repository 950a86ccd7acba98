"""The search for a student: candidates are measured as by evaluate_akl, and trained as by finetune_akl."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.calibration import random_samples
from helpers.commands import start
from helpers.families import FAMILIES, write_family
from helpers.memory_runs import model, watched
from helpers.ranks import in_processes
from helpers.runs import alice, distil, evaluate, gpt
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.prompts import Default
from transformers import AutoModelForCausalLM

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.messages import UserError
from litgpt_akl.models.candidates import Candidate
from litgpt_akl.models.depth import DepthSearch
from litgpt_akl.models.importance import measure_importance
from litgpt_akl.models.layerwise import LayerwiseModel
from litgpt_akl.models.parallel import return_freed_memory
from litgpt_akl.models.student_checkpoint import TeacherFiles
from litgpt_akl.models.student_config import SIZES, full_sizes
from litgpt_akl.training.candidate_search import CandidateSearch

LARGE = model(layers=12, width=768, vocab_size=1000)
RECORDS = {"records": 12, "kl_records": 4}


def forward_kl(student, teacher_dir, data, out_dir) -> float:
    """As evaluate_akl finds it on the validation records."""
    options = {"max_records": 48, "generation": GenerationArgs(seeds=[])}
    return evaluate(student, teacher_dir, data, out_dir, **options)["student"]["forward_kl"]


@pytest.mark.slow  # the chosen one's is tested below
def test_forward_kl_of_all_candidates_is_that_of_the_written_students(teacher_dir, alice_json, tmp_path, capsys):
    options = {"data": alice(alice_json), **RECORDS}
    make_student(teacher_dir, tmp_path / "best", params=0.7, candidates=4, trial_steps=0, **options)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "best" / "make_student.json").read_text())
    candidates, whole = record["candidates"], TeacherFiles.open(teacher_dir)
    budget = 0.7 * whole.size_of(range(4), full_sizes(whole.config)).whole
    assert len(candidates) == 4 and record["held_out_records"] == 40 and record["trial_steps"] == 0
    assert [each["forward_kl"] for each in candidates] == sorted(each["forward_kl"] for each in candidates)
    assert [each["chosen"] for each in candidates] == [True, False, False, False]
    for number, each in enumerate(candidates):
        sizes = {name: each[name] for name in SIZES if name != "experts"}
        make_student(teacher_dir, tmp_path / str(number), layers=each["kept"], **sizes, **options)
        found = forward_kl(tmp_path / str(number), teacher_dir, alice_json, tmp_path / f"evaluated-{number}")
        assert each["forward_kl"] == pytest.approx(found, rel=1e-5)
        written = torch.load(tmp_path / str(number) / "lit_model.pth", weights_only=True)
        assert each["parameters"] == sum({t.data_ptr(): t.numel() for t in written.values()}.values()) <= budget
        assert f"{each['forward_kl']:.3f}" in said
    assert (tmp_path / "best" / "lit_model.pth").read_bytes() == (tmp_path / "0" / "lit_model.pth").read_bytes()


@pytest.mark.parametrize("candidates", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_the_best_few_are_trained_as_finetune_akl_trains_them(teacher_dir, short, tmp_path, capsys, candidates):
    options = {"params": 0.7, "candidates": candidates, "trial_steps": 3, "data": short, "max_seq_length": 100}
    options |= RECORDS
    make_student(teacher_dir, tmp_path / "best", **options)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "best" / "make_student.json").read_text())
    trained = [each for each in record["candidates"] if each["forward_kl_after"] is not None]
    assert record["trial_steps"] == 3 and trained == record["candidates"][:3]
    (chosen,) = [each for each in trained if each["chosen"]]
    assert chosen["forward_kl_after"] == min(each["forward_kl_after"] for each in trained)
    assert sorted(os.listdir(tmp_path)) == ["best", "short"]
    sizes = {name: chosen[name] for name in SIZES if name != "experts"}
    make_student(
        teacher_dir, tmp_path / "named", layers=chosen["kept"], **sizes, data=short, max_seq_length=100, **RECORDS
    )
    # none of the training is in the student that is made
    assert (tmp_path / "best" / "lit_model.pth").read_bytes() == (tmp_path / "named" / "lit_model.pth").read_bytes()
    train = {"max_steps": 3, "max_seq_length": 100}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}}
    options = {"train": train, "optimizer": optimizer, "distill": {"divergence": "fkl", "kd_ratio": 1.0}}
    distil(tmp_path / "named", teacher_dir, short, tmp_path / "run", **options)
    found = forward_kl(tmp_path / "named", teacher_dir, short, tmp_path / "before")
    assert chosen["forward_kl"] == pytest.approx(found, rel=1e-5)
    found = forward_kl(tmp_path / "run" / "final", teacher_dir, short, tmp_path / "after")
    assert chosen["forward_kl_after"] == pytest.approx(found, rel=1e-4)
    first, at = (number for number, line in enumerate(lines) if line.startswith("  layers"))
    columns = ["params", "memory", "tokens/s", "KL"]
    assert lines[first].split()[-4:] == columns and lines[at].split()[-6:] == [*columns, "after", "3"]
    assert max(map(len, lines[at : at + candidates + 1])) <= 80
    (marked,) = [line for line in lines[at : at + candidates + 1] if line.startswith(">")]
    assert f"{chosen['forward_kl_after']:.3f}" in marked and f"{chosen['mlp']}" in marked
    assert (
        f"{chosen['tokens_per_second']:,.1f}".split(".")[0] in marked and chosen["memory"] == 4 * chosen["parameters"]
    )


def test_a_family_that_takes_no_other_sizes_has_one_candidate(tmp_path, alice_json, capsys):
    write_family("Llama-3.2-1B", tmp_path / "teacher", tied=False, layers=4)
    path = tmp_path / "teacher" / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"another"'))
    options = {"data": alice(alice_json), "method": "block_influence", **RECORDS}
    make_student(tmp_path / "teacher", tmp_path / "student", params=0.9, candidates=8, **options)
    assert "--candidates 8: Llama-3.2-1B has 1 of that size." in capsys.readouterr().out
    record = json.loads((tmp_path / "student" / "make_student.json").read_text())
    (only,) = record["candidates"]
    assert only["chosen"] and only["kept"] == record["kept"] and len(record["kept"]) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_candidates_that_it_allows(name, tmp_path, alice_json):
    write_family(name, tmp_path / "teacher", tied=False, layers=4)
    options = {"data": alice(alice_json), "method": "block_influence", **RECORDS}
    make_student(tmp_path / "teacher", tmp_path / "student", params=0.75, candidates=6, trial_steps=0, **options)
    record = json.loads((tmp_path / "student" / "make_student.json").read_text())
    assert len(record["candidates"]) > 2
    found = forward_kl(tmp_path / "student", tmp_path / "teacher", alice_json, tmp_path / "evaluated")
    assert record["candidates"][0]["forward_kl"] == pytest.approx(found, rel=1e-4, abs=1e-6)
    export_hf(tmp_path / "student", tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").num_parameters() > 0


@torch.no_grad()
def test_a_budget_of_all_is_the_teacher_bit_for_bit(teacher_dir, alice_json, tmp_path):
    make_student(teacher_dir, tmp_path / "student", params=1.0, candidates=3, data=alice(alice_json), **RECORDS)
    ids = torch.arange(4, 132).view(1, 128)
    assert torch.equal(gpt(tmp_path / "student").eval()(ids), gpt(teacher_dir).eval()(ids))
    record = json.loads((tmp_path / "student" / "make_student.json").read_text())
    assert [each["forward_kl"] for each in record["candidates"]] == [0.0]


def test_wrong_searches_are_refused(teacher_dir, short, tmp_path):
    data = {"data": short}
    cases = [
        ({"candidates": 4, "layers": 2, **data}, "--candidates 4 are students of as many .*Give --params, such as 0.8"),
        ({"candidates": 1, "params": 0.8, **data}, "--candidates must be at least 2, got 1"),
        ({"candidates": 4, "params": 0.8}, "--candidates 4 is decided by calibration records"),
        ({"candidates": 4, "params": 0.8, "mlp": 0.5, **data}, "--mlp 0.5 has no effect with --candidates 4"),
        ({"candidates": 4, "params": 0.05, **data}, "--params 0.05 are .*Give --params 0.58 or more"),
        ({"params": 0.8, "trial_steps": 5, **data}, "--trial_steps 5 has no effect without --candidates"),
        ({"candidates": 4, "params": 0.8, "trial_steps": -1, **data}, "--trial_steps must not be negative, got -1"),
        ({"params": 0.8, "scores": tmp_path / "s"}, "--scores .* has no effect where no calibration records are read"),
        ({"params": 0.8, "scores": tmp_path, **data}, "--scores .* is a directory"),
        ({"params": 0.8, "scores": tmp_path / "none" / "s", **data}, "lies in no directory that is there"),
        ({"params": 0.8, "scores": tmp_path / "student" / "s", **data}, "lies in out_dir .*, which is to be new"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as raised:
            make_student(teacher_dir, tmp_path / "student", **options)
        assert len(str(raised.value).splitlines()) <= 2
    assert os.listdir(tmp_path) == ["short"]
    # the way out
    make_student(teacher_dir, tmp_path / "small", params=0.58, candidates=2, trial_steps=0, **data, **RECORDS)


def test_data_that_holds_nothing_out_are_refused(teacher_dir, alice_json, tmp_path):
    data = tmp_path / "train.json"
    data.write_bytes((alice_json / "train.json").read_bytes())
    options = {"json_path": data, "mask_prompt": True, "prompt_style": Default(), "num_workers": 0}
    make = {"params": 0.8, "candidates": 2, "trial_steps": 0, **RECORDS}
    with pytest.raises(UserError, match="--candidates: the data holds out no records"):
        make_student(teacher_dir, tmp_path / "student", data=JSON(**options, val_split_fraction=0.001), **make)
    make_student(teacher_dir, tmp_path / "student", data=JSON(**options, val_split_fraction=0.1), **make)


@pytest.mark.slow  # a run of its own
def test_a_signal_leaves_nothing_but_whole_scores(teacher_dir, alice_json, tmp_path):
    scores = tmp_path / "scores.safetensors"
    words = ["make_student", str(teacher_dir), str(tmp_path / "student"), "--params", "0.7", "--candidates", "3"]
    words += ["--data", "JSON", "--data.json_path", str(alice_json), "--data.mask_prompt", "true", "--scores", scores]
    words += ["--data.num_workers", "0", "--data.prompt_style.class_path", "litgpt.prompts.Default"]
    words += ["--records", "8", "--trial_steps", "100000"]
    process, deadline = start([*map(str, words)], tmp_path / "output", tmp_path / "errors"), time.monotonic() + 90
    while not (tmp_path / "output").exists() or "step " not in (tmp_path / "output").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert sorted(os.listdir(tmp_path)) == ["errors", "output", "scores.safetensors"]
    options = {"data": alice(alice_json), "records": 8, "scores": scores}
    make_student(teacher_dir, tmp_path / "student", params=0.7, **options)


def look_at_a_teacher(directory: Path) -> None:
    """Scores, removals and candidates of a teacher; writes by how many bytes this process has grown meanwhile."""
    return_freed_memory()
    samples, sizes = random_samples([30, 20, 40], 1000), full_sizes(LARGE)
    weights = torch.load(directory / "lit_model.pth", mmap=True, weights_only=True)
    candidates = [Candidate(10, {**sizes, "mlp": 1024, "width": 640}, 0), Candidate(11, {**sizes, "heads": 8}, 0)]

    def look(samples: list) -> None:
        teacher = LayerwiseModel(LARGE, weights, torch.device("cpu"), torch.float32, 40)
        importance = measure_importance(teacher, samples)
        DepthSearch(teacher, samples, 1000).remove(11)
        files = TeacherFiles(directory, LARGE, weights, 1000, False, "llama", ())
        CandidateSearch(files, teacher, importance, lambda count: [*range(count)], samples, 1000).measure(candidates)

    # what the libraries load when they are first used
    look(samples[:1])
    with watched() as result:
        look(samples)
    (directory / "growth").write_text(str(result["growth"]))


@pytest.mark.slow  # a process that is watched
def test_memory_is_one_block_whatever_the_teacher_has(tmp_path):
    """A teacher in half precision, which would take 350 MB in float32."""
    with torch.device("meta"):
        tensors = GPT(LARGE).state_dict()
    weights = {name: torch.full(of.shape, 0.01, dtype=torch.bfloat16) for name, of in tensors.items()}
    torch.save(weights, tmp_path / "lit_model.pth")
    in_processes(1, look_at_a_teacher, tmp_path)
    whole = sum(4 * tensor.numel() for name, tensor in weights.items() if name.startswith("transformer.h."))
    # one of 12 blocks, one that is cut from it, and what a block makes of the candidates' hidden states
    assert int((tmp_path / "growth").read_text()) < 3 * whole / 12
