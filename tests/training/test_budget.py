"""Budgets of memory and of speed: what students cost, how many layers fit, and which students compete."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.families import write_family

from litgpt_akl.commands.make_student import make_student
from litgpt_akl.messages import UserError
from litgpt_akl.models.candidates import Candidate
from litgpt_akl.models.token_time import TokenTime
from litgpt_akl.models.weights import read_config
from litgpt_akl.training.candidate_search import Measured, table
from litgpt_akl.training.student_making import bytes_of

RECORDS = {"records": 12, "kl_records": 4}


def written_bytes(directory: Path) -> int:
    """Of all tensors in a checkpoint; those that are one in memory count once."""
    weights = torch.load(directory / "lit_model.pth", weights_only=True)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in weights.values()}.values())


def in_half_precision(teacher: Path, directory: Path) -> Path:
    shutil.copytree(teacher, directory)
    weights = torch.load(teacher / "lit_model.pth", weights_only=True)
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    half["lm_head.weight"] = half["transformer.wte.weight"]
    torch.save(half, directory / "lit_model.pth")
    return directory


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 5e8), ("1.5GB", 1.5e9), ("2GiB", 2**31), (".5 kb", 500), ("3TB", 3e12), ("700B", 700), ("1 MiB", 2**20)],
)
def test_sizes_have_units(text, size):
    assert bytes_of(text) == size


def test_layers_fit_the_memory_of_the_weights(teacher_dir, tmp_path):
    sizes = []
    for layers in range(1, 5):
        make_student(teacher_dir, tmp_path / str(layers), layers=layers)
        sizes.append(written_bytes(tmp_path / str(layers)))
    for name, memory, layers in [("a", f"{sizes[1]}B", 2), ("b", f"{sizes[2] - 1}B", 2), ("c", "1GB", 4)]:
        make_student(teacher_dir, tmp_path / name, memory=memory)
        assert read_config(tmp_path / name).n_layer == layers
    # the same number of bytes holds more of a teacher in half precision
    half = in_half_precision(teacher_dir, tmp_path / "half")
    make_student(half, tmp_path / "of half", memory=f"{sizes[0]}B")
    assert read_config(tmp_path / "of half").n_layer == 2
    assert written_bytes(tmp_path / "of half") <= sizes[0]


@pytest.mark.parametrize("share", [0.8, 0.65])
def test_candidates_fit_the_memory(teacher_dir, short, tmp_path, share):
    half = in_half_precision(teacher_dir, tmp_path / "half")
    memory = f"{int(share * written_bytes(half))}B"
    make_student(half, tmp_path / "student", memory=memory, candidates=3, trial_steps=0, data=short, **RECORDS)
    candidates = json.loads((tmp_path / "student" / "make_student.json").read_text())["candidates"]
    assert len(candidates) == 3 and candidates[0]["chosen"]
    for each in candidates:
        assert 0.5 * bytes_of(memory) < each["memory"] == 2 * each["parameters"] <= bytes_of(memory)
    assert written_bytes(tmp_path / "student") == candidates[0]["memory"]


def test_speed_is_that_of_the_fastest_quarter():
    """What is in a few rounds slowed by other work does not count, but as what measurements vary by."""
    slowed = torch.tensor([1.0, 1.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    time = TokenTime(root=0.1 * slowed, block=0.05 * slowed, reference=0.6 * slowed.flip(0))
    assert time.speed(4).ratio == pytest.approx(0.6 / 0.3)
    assert time.speed(4).spread == pytest.approx(0.6 * (1 / 0.3 - 1 / 0.6) / 2)
    assert time.speed(10).ratio == pytest.approx(1.0)


def test_a_student_is_as_fast_as_it_is_to_be(teacher_dir, tmp_path):
    """Of a teacher of many layers, beside which the rest takes little time; what is measured varies."""
    write_family("Llama-3.2-1B", teacher := tmp_path / "teacher", tied=False, layers=24)
    layers = {}
    for speed in (1.5, 3.0):
        make_student(teacher, tmp_path / str(speed), speed=speed)
        layers[speed] = read_config(tmp_path / str(speed)).n_layer
    assert 11 <= layers[1.5] <= 20 and 4 <= layers[3.0] <= 10


@pytest.mark.slow  # dozens of sizes are timed
@pytest.mark.parametrize("speed", [1.3, 2.0])
def test_candidates_are_as_fast_as_they_are_to_be(tmp_path, short, capsys, speed):
    write_family("Qwen3-30B-A3B", teacher := tmp_path / "teacher", tied=False, layers=8)
    options = {"candidates": 4, "trial_steps": 0, "data": short, "method": "block_influence", **RECORDS}
    make_student(teacher, tmp_path / "student", speed=speed, **options)
    record = json.loads((tmp_path / "student" / "make_student.json").read_text())
    assert len(record["candidates"]) > 1
    for each in record["candidates"]:
        assert 0.7 * speed < each["speed"] < 2 * speed
        assert each["tokens_per_second"] == pytest.approx(each["speed"] * record["teacher_tokens_per_second"])
        assert each["tokens_per_second_spread"] > 0 and each["memory"] == 4 * each["parameters"]
    assert min(each["layers"] for each in record["candidates"]) < 8
    said = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(said) if "tokens/s" in line)
    assert max(map(len, said[at : at + 1 + len(record["candidates"])])) <= 80 and "experts" in said[at]
    assert f"The teacher has {record['teacher_tokens_per_second']:,.1f} tokens/s." in said


def test_the_table_of_large_models_has_80_columns():
    sizes = {"width": 16384, "mlp": 53248, "heads": 128, "experts": 128}
    large = {"kept": None, "parameters": 405_853_388_800, "memory": 811_706_777_600, "forward_kl": 12.3456}
    measured = [
        Measured(candidate=Candidate(126, sizes, 0.0), **large, forward_kl_after=after, tokens_per_second=tokens)
        for after, tokens in ((None, 12345.6), (10.25, 99.94))
    ]
    for each in measured:
        each.tokens_per_second_spread = each.tokens_per_second / 20
    assert {len(line) for line in table(measured, 50).splitlines()} <= {71, 80}


def test_wrong_budgets_are_refused(teacher_dir, short, tmp_path):
    write_family("Llama-3.2-1B", deep := tmp_path / "deep", tied=False, layers=24)
    search = {"candidates": 3, "trial_steps": 0, "data": short, **RECORDS}
    cases = [
        ({"memory": "5"}, "--memory must be a size above 0 with its unit, got 5.\nGive one such as 500MB"),
        ({"memory": "0MB"}, "--memory must be a size above 0 with its unit, got 0MB"),
        ({"memory": "much"}, "got much"),
        ({"memory": "0.8"}, "got 0.8.\nGive .*; a share of the teacher's parameters is --params, such as 0.8"),
        ({"speed": 1.0}, "--speed must be above 1, got 1: a multiple .*\nGive one such as 1.5"),
        ({"speed": float("inf")}, "--speed must be above 1, got inf"),
        ({"speed": 2.0, "memory": "1MB"}, "--memory 1MB and --speed 2.0 both tell the depth.\nGive one of them"),
        ({"layers": 2, "speed": 2.0}, "--layers 2 and --speed 2.0 both tell the depth"),
        ({"memory": "100KB", **search}, "--memory 100KB, but the weights of 2 of 4 layers .* take .* [MK]B.\nGive"),
        ({"speed": 1000.0, **search}, "--speed 1000, but 2 of 24 layers .* write .* times as many tokens .*\nGive"),
    ]
    for options, message in cases:
        teacher = deep if "speed" in options else teacher_dir
        with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as raised:
            make_student(teacher, tmp_path / "student", **options)
        assert len(str(raised.value).splitlines()) == 2
        ways_out = re.findall(r"Give --(memory|speed) (\S+?) or", str(raised.value))
        for name, value in ways_out:
            try_way_out(teacher, tmp_path / name, name, value)
    assert len(ways_out) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "memory", "short", "speed"]


def try_way_out(teacher: Path, out_dir: Path, name: str, value: str) -> None:
    """A few times, since what is timed on a busy machine varies."""
    for left in (2, 1, 0):
        try:
            return make_student(teacher, out_dir, **{name: value if name == "memory" else float(value)})
        except UserError:
            if left == 0:
                raise
