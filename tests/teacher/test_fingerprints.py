"""One number of a teacher changes, in whichever file it lies: it is another teacher, and its cache is refused."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import materials
import pytest
import torch
from helpers.cache_runs import assert_equal, fill, run
from helpers.runs import distil
from litgpt.model import GPT

from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.files.directories import default_cache_dir
from litgpt_akl.files.manifest import write_manifest
from litgpt_akl.files.reading import with_checksum
from litgpt_akl.messages import UserError
from litgpt_akl.models import hf as hf_weights
from litgpt_akl.models import weights as fingerprints
from litgpt_akl.models.weights import fingerprint, open_weights, read_config
from litgpt_akl.teacher.cache_identity import IDENTITY, read_identity

CONFIG = replace(materials.TEACHER_CONFIG, n_layer=3, n_embd=512, head_size=128, intermediate_size=1365)
"""Of 40 MB, of which the fingerprints of before read a tenth."""
OLD = "0" * 32


def write_pth(directory: Path, weights: dict) -> None:
    torch.save(weights, directory / "lit_model.pth")


def write_pth_in_an_entry(directory: Path, weights: dict) -> None:
    torch.save({"model": weights}, directory / "lit_model.pth")


def write_pth_without_checksums(directory: Path, weights: dict) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, directory / "lit_model.pth")
    finally:
        torch.serialization.set_crc32_options(True)


def write_old_pth(directory: Path, weights: dict) -> None:
    torch.save(weights, directory / "lit_model.pth", _use_new_zipfile_serialization=False)


def write_safetensors(directory: Path, weights: dict) -> None:
    hf_weights.write(directory, read_config(directory), weights, max_shard_size="5GB")


def write_shards(directory: Path, weights: dict) -> None:
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    hf_weights.write(directory, read_config(directory), weights, max_shard_size="10MB")


KINDS = {
    function.__name__: function
    for function in (
        write_pth,
        write_pth_in_an_entry,
        write_pth_without_checksums,
        write_safetensors,
        write_shards,
    )
}


def change(weights: dict, name: str) -> dict:
    """The same weights, but for the last number of one tensor."""
    changed = weights[name].clone()
    changed.view(-1)[-1] += 1
    return weights | {name: changed}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(CONFIG).state_dict()


@pytest.fixture(scope="module")
def bare(weights, tmp_path_factory) -> Path:
    """A checkpoint directory without weights."""
    directory = tmp_path_factory.mktemp("bare") / "teacher"
    materials.write_checkpoint(directory, CONFIG, weights, tied=False)
    (directory / "lit_model.pth").unlink()
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_one_number_makes_another_teacher_in_every_kind_of_file(bare, weights, tmp_path, kind):
    found, of_samples, names = {}, set(), [*weights][::4]
    for name in ("", *names):
        directory = shutil.copytree(bare, tmp_path / (name or "as it is"))
        KINDS[kind](directory, change(weights, name) if name else weights)
        found[name] = fingerprint(directory)
        of_samples.add(fingerprint(directory, like=OLD))
    assert len({*found.values()}) == len(names) + 1
    # those of before read samples
    assert len(of_samples) < len(names) + 1
    copy = shutil.copytree(tmp_path / "as it is", tmp_path / "a copy elsewhere")
    assert fingerprint(copy) == fingerprint(copy, like=found[""]) == found[""]
    KINDS[kind](copy, weights)
    assert fingerprint(copy) == found[""]


def test_a_file_without_checksums_is_told_by_each_byte(bare, weights, tmp_path):
    for write in (write_old_pth, write_pth_without_checksums):
        directory = shutil.copytree(bare, tmp_path / write.__name__)
        write(directory, weights)
        path, found = directory / "lit_model.pth", {fingerprint(directory)}
        for place in range(1, path.stat().st_size, path.stat().st_size // 6):
            change_in_place(path, place)
            found.add(fingerprint(directory))
        assert len(found) == 8


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def cost(directory: Path) -> int:
    """Bytes that a process reads for a fingerprint if it has made none before."""
    fingerprints._known.clear()
    before = bytes_read()
    fingerprint(directory)
    return bytes_read() - before


@pytest.fixture
def settled(bare, weights, tmp_path) -> Path:
    """A teacher in safetensors files that have not changed for longer than a clock's step."""
    directory = shutil.copytree(bare, tmp_path / "settled" / "teacher")
    write_shards(directory, weights)
    time.sleep(fingerprints.CLOCK_STEP / 1e9 + 0.1)
    return directory


def memories(directory: Path) -> list[Path]:
    return [fingerprints._memory_of(path) for path in hf_weights.files_in(directory)]


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in hf_weights.files_in(directory))


def test_files_are_read_once(settled):
    assert cost(settled) >= size(settled)
    assert cost(settled) < 1_000_000
    # of what torch.save writes the checksums are read
    weights = open_weights(settled, read_config(settled))
    write_pth(settled, weights)
    assert cost(settled) < 1_000_000


DAMAGES = {
    "gone": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, 40),
    "not JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "a list": lambda path: path.write_text("[1]"),
    "another checksum": lambda path: path.write_text(path.read_text().replace('"content": "', '"content": "0')),
    "no entries": lambda path: path.write_text(json.dumps(with_checksum({}))),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_is_not_used(settled, damage):
    expected = fingerprint(settled)
    for path in memories(settled):
        DAMAGES[damage](path)
    assert cost(settled) >= size(settled)
    assert fingerprint(settled) == expected
    if damage != "a directory":
        assert cost(settled) < 1_000_000


def test_where_nothing_can_be_kept_files_are_read_again(settled, tmp_path, monkeypatch):
    expected = fingerprint(settled)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file"))
    assert fingerprint(settled) == expected
    assert cost(settled) >= size(settled)
    # but not by the same process
    before = bytes_read()
    assert fingerprint(settled) == expected and bytes_read() - before < 1_000_000


def change_in_place(path: Path, from_end: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(-from_end, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-from_end, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def test_a_change_that_leaves_size_and_time_is_noticed(settled):
    expected = fingerprint(settled)
    path = hf_weights.files_in(settled)[0]
    status = path.stat()
    change_in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(settled) != expected
    change_in_place(path)
    assert fingerprint(settled) == expected
    # another file under its name
    changed = path.with_name("other")
    shutil.copyfile(path, changed)
    change_in_place(changed)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed.replace(path)
    assert fingerprint(settled) != expected


def test_of_a_file_just_written_nothing_is_remembered(bare, weights, tmp_path):
    directory = shutil.copytree(bare, tmp_path / "teacher")
    write_safetensors(directory, weights)
    fingerprint(directory)
    assert not any(path.exists() for path in memories(directory))
    # the clock of another machine may be ahead
    path = hf_weights.files_in(directory)[0]
    os.utime(path, (time.time() + 1000, time.time() + 1000))
    time.sleep(fingerprints.CLOCK_STEP / 1e9 + 0.1)
    fingerprint(directory)
    assert not any(path.exists() for path in memories(directory))


def as_safetensors(teacher_dir: Path, directory: Path, weights: dict) -> Path:
    shutil.copytree(teacher_dir, directory, ignore=shutil.ignore_patterns("lit_model.pth"))
    write_shards(directory, weights)
    return directory


def as_pth(teacher_dir: Path, directory: Path, weights: dict) -> Path:
    shutil.copytree(teacher_dir, directory)
    write_pth(directory, weights)
    return directory


@pytest.mark.parametrize("write", [as_pth, as_safetensors])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_cache_of_another_teacher_is_refused(student_dir, teacher_dir, short, tmp_path, write, quantize):
    cache, options = str(tmp_path / "cache"), {"train": {"max_steps": 1, "global_batch_size": 2}}

    def teach(teacher: Path, mode: str) -> None:
        args = TeacherArgs(cache_dir=cache, cache_mode=mode, quantize=quantize)
        distil(student_dir, teacher, short, tmp_path / f"run {len([*tmp_path.iterdir()])}", teacher=args, **options)

    weights = torch.load(teacher_dir / "lit_model.pth")
    teach(write(teacher_dir, tmp_path / "one" / teacher_dir.name, weights), "auto")
    # the copy has other times and another inode
    teach(write(teacher_dir, tmp_path / "same" / teacher_dir.name, weights), "read")
    other = write(
        teacher_dir, tmp_path / "other" / teacher_dir.name, change(weights, "transformer.h.1.mlp.proj.weight")
    )
    with pytest.raises(UserError, match="was filled for something else: teacher_weights '2-"):
        teach(other, "read")


def rewrite_identity(cache: Path, **changes) -> None:
    content = read_identity(str(cache)) | changes
    (cache / IDENTITY).write_text(json.dumps(with_checksum(content)))


def test_a_cache_with_a_fingerprint_of_before_is_accepted(student_dir, teacher_dir, lone, short, tmp_path):
    cache = tmp_path / "cache"
    options = {"train": {"epochs": 1}}
    fill(student_dir, teacher_dir, short, tmp_path / "none", cache, **options)
    rewrite_identity(cache, teacher_weights=fingerprint(teacher_dir, like=OLD))
    live = run(student_dir, teacher_dir, short, tmp_path / "live", **options)
    for teacher in (teacher_dir, lone):
        out_dir = tmp_path / f"with {teacher.parent.name}"
        assert_equal(live, run(student_dir, teacher, short, out_dir, cache, mode="read", **options))
    other = as_pth(teacher_dir, tmp_path / "other" / "teacher", _doubled(teacher_dir))
    with pytest.raises(UserError, match="was filled for something else: teacher_weights"):
        run(student_dir, other, short, tmp_path / "refused", cache, mode="read", **options)


def _doubled(directory: Path) -> dict[str, torch.Tensor]:
    return {name: 2 * tensor for name, tensor in torch.load(directory / "lit_model.pth").items()}


def test_a_run_with_fingerprints_of_before_goes_on(student_dir, teacher_dir, untied_student_dir, short, tmp_path):
    out_dir, options = tmp_path / "run", {"train": {"max_steps": 2, "save_interval": 1}}
    expected = distil(student_dir, teacher_dir, short, out_dir, **options)
    step = out_dir / "step-000001"
    shutil.rmtree(out_dir / "final")
    shutil.rmtree(out_dir / "step-000002", ignore_errors=True)
    state = torch.load(step / "training_state.pth", weights_only=True)
    assert all(recorded.startswith("2-") for recorded in state["models"].values())
    directories = {"student": student_dir, "teacher": teacher_dir}
    state["models"] = {role: fingerprint(directory, like=OLD) for role, directory in directories.items()}
    torch.save(state, step / "training_state.pth")
    (step / "manifest.json").unlink()
    write_manifest(step, 1, None)
    with pytest.raises(UserError, match="the teacher has other weights"):
        distil(student_dir, untied_student_dir, short, out_dir, resume=step, **options)
    assert_equal(expected, distil(student_dir, teacher_dir, short, out_dir, resume=step, **options))


def test_memory_lies_with_other_data_that_can_be_made_again(settled, prepared_data):
    fingerprint(settled)
    assert default_cache_dir().is_relative_to(prepared_data)
    assert all(path.parent == default_cache_dir() / "weights" for path in memories(settled))
