"""A teacher in several safetensors files, as Hugging Face has it, is the same teacher."""

import shutil

import pytest
import torch
from helpers.runs import distil
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from transformers import AutoModelForCausalLM

from litgpt_akl.messages import UserError
from litgpt_akl.models.weights import find_checkpoint_dir, fingerprint, open_weights, read_config


@pytest.fixture(scope="module")
def hf_dir(teacher_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "teacher"
    shutil.copytree(teacher_dir, directory, ignore=shutil.ignore_patterns("lit_model.pth"))
    converted = tmp_path_factory.mktemp("converted")
    convert_lit_checkpoint(teacher_dir, converted)
    shutil.copy(teacher_dir / "config.json", converted)
    (converted / "model.pth").rename(converted / "pytorch_model.bin")
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="1MB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def test_its_weights_are_those_of_the_converted_one(hf_dir, teacher_dir):
    assert find_checkpoint_dir(hf_dir, "teacher") == hf_dir
    weights = open_weights(hf_dir, read_config(hf_dir))
    expected = torch.load(teacher_dir / "lit_model.pth")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert fingerprint(hf_dir) == fingerprint(hf_dir) != fingerprint(teacher_dir)


def test_it_teaches_the_same(hf_dir, teacher_dir, student_dir, alice_json, tmp_path):
    students = [
        distil(student_dir, teacher, alice_json, tmp_path / str(number))
        for number, teacher in enumerate((hf_dir, teacher_dir))
    ]
    assert all(torch.equal(weight, students[1][name]) for name, weight in students[0].items())


def test_a_cut_file_is_told(hf_dir, tmp_path):
    directory = shutil.copytree(hf_dir, tmp_path / "cut")
    path = sorted(directory.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path.name} \(.* bytes\) cannot be read as safetensors"):
        open_weights(directory, read_config(directory))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read as|does not fit"):
        open_weights(directory, read_config(directory))


def test_a_student_needs_more(hf_dir):
    with pytest.raises(UserError, match="lacks lit_model.pth"):
        find_checkpoint_dir(hf_dir, "student")
