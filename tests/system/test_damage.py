"""Files that are cut, changed or of somebody else: refused in two lines, mended, or harmless, and never a traceback."""

import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.marks import few_or_many
from helpers.material import KINDS
from helpers.survey import GOOD, Survey, table

from litgpt_akl.commands.export_hf import export_hf
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.files.manifest import MANIFEST, damage
from litgpt_akl.files.reading import explain_damage, plain_names, with_checksum
from litgpt_akl.messages import UserError
from litgpt_akl.models.hf import INDEX, files_in
from litgpt_akl.models.tensor_file import check_tensors
from litgpt_akl.models.weights import find_checkpoint_dir, open_weights, read_config
from litgpt_akl.training.checkpoint import find_training_state

pytestmark = pytest.mark.page

CASES = pytest.mark.parametrize("cases", few_or_many("LITGPT_AKL_DAMAGES", 38, 78))
"""Damages that the survey tries, one or a few of each kind of file."""
SEED = int(os.environ.get("LITGPT_AKL_SEED", 0))
"""Which those are."""


@pytest.fixture(scope="module")
def survey(teacher_dir, student_dir, alice_json, tmp_path_factory, pytestconfig) -> Survey:
    base, thorough = tmp_path_factory.mktemp("damage"), pytestconfig.option.all
    return Survey(base, teacher_dir, student_dir, alice_json, thorough=thorough)


@pytest.fixture(scope="module")
def material(survey) -> Path:
    return survey.material


@CASES
def test_no_traceback_and_nothing_wrong_without_a_word(survey, cases):
    survey.counts.clear()
    survey.bad.clear()
    draw = random.Random(SEED)
    files = {name: survey.files(kind) for name, kind in KINDS.items()}
    names = [name for name, found in files.items() if found]
    for number in range(cases):
        name = names[number % len(names)]
        file, how = draw.randrange(len(files[name])), draw.choice(("cut", "bit", "bit", "byte"))
        survey.damaged_before(name, file, how, draw.choice(KINDS[name].commands), seed=draw.random())
    print(table(survey.counts))
    assert not survey.bad, "\n\n".join(survey.bad)
    assert survey.counts.total() == cases and {result for *_, result in survey.counts} <= {*GOOD}


@pytest.mark.parametrize("size", [0, 1, 5000, 100_000, -1])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_cut(material, tmp_path, role, size):
    directory = shutil.copytree(material / role, tmp_path / role)
    path = directory / "lit_model.pth"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    cut = path.stat().st_size
    for read in (lambda out: make_student(directory, out, layers=1), lambda out: export_hf(directory, out)):
        with pytest.raises(UserError, match=rf"lit_model.pth \({cut:,} bytes\) cannot be read as weights") as caught:
            read(tmp_path / "out")
        assert str(caught.value).splitlines()[1:] == ["Download or convert the model again."]
        assert not (tmp_path / "out").exists()


def test_a_changed_weight_is_found_by_the_files_own_checksum(material, tmp_path):
    directory = shutil.copytree(material / "student", tmp_path / "student")
    path, config = directory / "lit_model.pth", read_config(directory)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    changed = bytearray(whole)
    changed[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(changed)
    # PyTorch takes it
    torch.load(path, mmap=True, weights_only=True)
    with pytest.raises(UserError, match="Bad CRC-32"):
        open_weights(directory, config)
    path.write_bytes(whole)
    assert open_weights(directory, config)


def test_whole_weights_are_never_refused(tmp_path):
    """Several threads compute checksums, and on a GPU's machine with Python 3.12 they had got into each other's way."""
    torch.save({str(number): torch.full((1000,), number) for number in range(300)}, tmp_path / "weights.pth")
    for _ in range(30):
        check_tensors(tmp_path / "weights.pth", "weights")


def test_weights_without_checksums_are_read(material, tmp_path):
    directory = shutil.copytree(material / "student", tmp_path / "student")
    weights = open_weights(material / "student", read_config(directory))
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(weights, directory / "lit_model.pth")
    torch.serialization.set_crc32_options(before)
    found = open_weights(directory, read_config(directory))
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["lit_model.pth", "model_config.yaml", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("kind", ["run/step-000001", "run/final"])
def test_what_a_run_has_written_is_held_against_its_manifest(material, tmp_path, kind, name):
    directory = shutil.copytree(material / kind, tmp_path / "copy")
    path = directory / name
    # a change that any reader takes
    path.write_bytes(path.read_bytes().replace(b"10000", b"10001").replace(b"1024", b"1025") + b"\n")
    message = rf"copy is not as it was written: {name} has .* bytes.*\n.*delete its manifest.json"
    with pytest.raises(UserError, match=message):
        open_weights(find_checkpoint_dir(directory, "student"), read_config(material / kind))
    # the way out
    (directory / MANIFEST).unlink()
    shutil.copyfile(material / kind / name, path)
    assert open_weights(find_checkpoint_dir(directory, "student"), read_config(directory))


def test_a_made_student_has_a_manifest_and_a_trained_one_is_no_checkpoint(material, tmp_path):
    make_student(material / "teacher", tmp_path / "made", layers=2)
    assert damage(tmp_path / "made") is None and damage(material / "run" / "final") is None
    with pytest.raises(UserError, match="a student without the state of its training.*\n.*step-000002 is whole"):
        find_training_state(material / "run" / "final", tmp_path, print)


NAMES = ["", ".", "..", "../x", "/etc/x", "a/b", "..\\x", "C:x", "a\0b", 5, None, ["a"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_a_path_is_refused_wherever_it_is_read(material, tmp_path, name):
    with pytest.raises(UserError, match="x.json names a file"):
        plain_names(["good", name], "x.json")
    directory = shutil.copytree(material / "hf", tmp_path / "hf")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{INDEX}.* (names a file|cannot be read as an index)"):
        files_in(directory)
    if isinstance(name, str):
        step = shutil.copytree(material / "run" / "step-000001", tmp_path / "step-000001")
        manifest = json.loads((step / MANIFEST).read_text())
        del manifest["xxh3_128"]
        manifest["files"][name] = {"bytes": 0, "xxh3_128": ""}
        (step / MANIFEST).write_text(json.dumps(with_checksum(manifest)))
        assert "names a file" in damage(step)


def test_a_name_twice():
    assert plain_names(["a", "b.bin"], "x.json") == ["a", "b.bin"]
    with pytest.raises(UserError, match="names the file 'a' twice"):
        plain_names(["a", "b", "a"], "x.json")


def test_an_index_chooses_the_files_and_says_what_is_in_them(material, tmp_path):
    directory = shutil.copytree(material / "hf", tmp_path / "hf")
    config, whole = read_config(directory), open_weights(material / "hf", read_config(directory))
    (directory / "other.safetensors").write_bytes(b"of another model")
    found = open_weights(directory, config)
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())
    (directory / "other.safetensors").unlink()
    index = json.loads((directory / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    moved = next(name for name, place in index["weight_map"].items() if place == first)
    index["weight_map"][moved] = last
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{last} lacks {moved}"):
        open_weights(directory, config)
    (directory / INDEX).unlink()
    assert open_weights(directory, config).keys() == whole.keys()
    shutil.copyfile(directory / first, directory / "copy.safetensors")
    with pytest.raises(UserError, match="which another file of"):
        open_weights(directory, config)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("n_layer", "2"), ("scale_embeddings", "no way"), ("norm_eps", "1e-6x"), ("bias", 1), ("mlp_class_name", "Other")],
)
def test_an_entry_of_the_wrong_kind(material, tmp_path, entry, value):
    directory = shutil.copytree(material / "student", tmp_path / "student")
    path = directory / "model_config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{entry}:")]
    path.write_text("\n".join([*lines, f"{entry}: {json.dumps(value)}"]))
    with pytest.raises(UserError, match=rf"model_config.yaml \(.*{entry} is "):
        read_config(directory)


def test_a_panic_in_rust_is_explained_and_an_interrupt_is_not():
    class PanicException(BaseException):
        pass

    with pytest.raises(UserError, match="x.json cannot be read as JSON: .*PanicException: oh"):
        with explain_damage("x.json", "JSON"):
            raise PanicException("oh")
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), explain_damage("x.json", "JSON"):
            raise error
