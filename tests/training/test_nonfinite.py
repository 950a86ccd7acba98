"""Where the samples of a step that is not finite come from: told by one process, which reads the data once at most."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.ranks import in_processes
from helpers.runs import distil
from litgpt.prompts import Default

from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.models.parallel import rank
from litgpt_akl.training import main as main_module

BROKEN = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e20, "foreach": False}}


def fail_once(student: Path, teacher: Path, data, path: Path, out_dir: Path, devices: int) -> None:
    """A run whose second step is not finite; writes how often each process opens ``path`` from the first step on."""
    torch.set_num_threads(1)
    fit, opened = main_module.fit, []

    def counting_fit(*arguments, **options):
        sys.addaudithook(lambda event, of: opened.append(of) if event == "open" and str(of[0]) == str(path) else None)
        return fit(*arguments, **options)

    main_module.fit = counting_fit
    train = {"max_steps": 2, "global_batch_size": 16, "max_norm": None, "lr_warmup_steps": 0}
    eval = {"initial_validation": False, "final_validation": False}
    options = {"train": train, "eval": eval, "optimizer": BROKEN, "on_nonfinite": "skip"}
    distil(student, teacher, data, out_dir, devices=devices, **options)
    (out_dir / f"opened-{rank()}").write_text(str(len(opened)))


@pytest.mark.parametrize("kind", ["JSON", "StreamingSFT"])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_data_is_read_once_at_most(student_dir, teacher_dir, short, tmp_path, kind, devices):
    path, data = short.json_path / "train.json", short
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    if kind == "StreamingSFT":
        data = StreamingSFT(str(path), mask_prompt=True, prompt_style=Default(), num_workers=0, num_proc=1)
        data.val_split_fraction, data.cache_dir = 0.0, tmp_path / "prepared"
    in_processes(devices, partial(fail_once, student_dir, teacher_dir, data, path, tmp_path / "run", devices))
    (report,) = (tmp_path / "run").glob("nonfinite-step-*.json")
    samples = json.loads(report.read_text())["samples"]
    begins = [number for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip() == "{"]
    found = {sample["number"]: int(re.search(r"train.json, line (\d+)", sample["place"])[1]) for sample in samples}
    assert len(found) == 16 and found == {number: begins[number] for number in found}
    opened = [int((tmp_path / "run" / f"opened-{number}").read_text()) for number in range(devices)]
    assert opened[0] <= 1 and opened[1:] == [0] * (devices - 1)
