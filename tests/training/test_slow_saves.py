"""A save that takes longer than processes wait for each other, and reads nothing that it has written."""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import make_state, save, train
from helpers.ranks import in_processes
from torch import distributed
from torch.distributed.fsdp import fully_shard

from litgpt_akl.files import manifest
from litgpt_akl.files.directories import remove_directory
from litgpt_akl.models import tensor_file
from litgpt_akl.training.checkpoint import load_training_state

LIMIT = 2.0
"""Seconds that processes wait for each other."""


def slowly(function):
    """Once, it takes longer than that."""
    left = [1]

    def slow(*arguments, **options):
        if left and distributed.get_rank() == 0:
            left.pop()
            time.sleep(LIMIT + 2)
        return function(*arguments, **options)

    return slow


SLOW = {
    "writing a tensor": (tensor_file._File, "write"),
    "the manifest": ("litgpt_akl.training.checkpoint", "write_manifest"),
    "flushing": ("litgpt_akl.files.directories", "_flush_tree"),
    "deleting older ones": ("litgpt_akl.training.checkpoint", "remove_old"),
    "deleting leftovers": ("litgpt_akl.training.checkpoint", "clear_leftovers"),
}


def save_slowly(out_dir: Path, source: Path, what: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    state = make_state()
    fully_shard(state["student"])
    state["optimizer"] = torch.optim.AdamW(state["student"].parameters(), lr=0.1)
    state["scheduler"] = torch.optim.lr_scheduler.LambdaLR(state["optimizer"], lambda step: 1.0)
    state["student"](torch.ones(4, 32)).square().mean().backward()
    state["optimizer"].step()
    place, name = SLOW[what]
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(place, str):
            patch.setattr(f"{place}.{name}", slowly(getattr(__import__(place, fromlist=[name]), name)))
        else:
            patch.setattr(place, name, slowly(getattr(place, name)))
        save(out_dir, {**state, "step_count": 1}, source, keep_last=1)
    # the group is as sound as before
    total = torch.ones(1)
    distributed.all_reduce(total)
    assert total.item() == 2
    distributed.destroy_process_group()


@pytest.mark.parametrize("what", SLOW)
def test_processes_wait_for_the_one_that_writes(student_dir, tmp_path, what):
    in_processes(2, partial(save_slowly, tmp_path, student_dir, what))
    assert manifest.damage(tmp_path / "step-000001") is None
    load_training_state(tmp_path / "step-000001", make_state())


def bytes_read() -> int:
    """By this process, from files and everything else."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_what_was_written_is_not_read_again(student_dir, tmp_path):
    state = make_state(width=1500)
    train(state, 1)
    before = bytes_read()
    first = save(tmp_path, state, student_dir, keep_last=1)
    state["step_count"] += 1
    second = save(tmp_path, state, student_dir, keep_last=1)
    size = sum(path.stat().st_size for path in second.iterdir())
    assert bytes_read() - before < size / 5 and not first.exists()
    # and the checksums are those of what is there
    manifest._known.clear()
    before = bytes_read()
    assert manifest.damage(second) is None
    assert bytes_read() - before >= size
    remove_directory(second)
