"""Short runs of `finetune_akl.setup` in process, on the test material."""

import csv
import json
from pathlib import Path

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.prompts import Default

from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.config.distillation import DistillArgs


def alice(path: Path) -> JSON:
    return JSON(json_path=path, mask_prompt=True, prompt_style=Default(), num_workers=0)


def short_data(alice_json: Path, directory: Path) -> JSON:
    """Forty of the records, of which few are of one length, in a directory that is made for them."""
    directory.mkdir()
    for name, number in (("train", 40), ("val", 7)):
        records = json.loads((alice_json / f"{name}.json").read_text())
        (directory / f"{name}.json").write_text(json.dumps(records[:number]))
    return alice(directory)


def train_args(**changes) -> TrainArgs:
    defaults = dict(global_batch_size=8, micro_batch_size=4, epochs=None, max_steps=3, max_norm=1.0, min_lr=0.0)
    return TrainArgs(**{"lr_warmup_steps": None, "save_interval": None, **defaults, **changes})


def eval_args(**changes) -> EvalArgs:
    return EvalArgs(**{"interval": 1000, "max_iters": 4, "max_new_tokens": None, "initial_validation": True, **changes})


def distil(
    student: Path, teacher_dir: Path | None, data: JSON | Path, out_dir: Path, **changes
) -> dict[str, torch.Tensor]:
    """Run and return the weights in ``final``; ``train``, ``eval`` and ``distill`` are given as dicts of changes."""
    setup(
        student,
        teacher_checkpoint_dir=teacher_dir,
        data=alice(data) if isinstance(data, Path) else data,
        out_dir=out_dir,
        train=train_args(**changes.pop("train", {})),
        eval=eval_args(**changes.pop("eval", {})),
        distill=DistillArgs(**{"compile": False, **changes.pop("distill", {})}),
        optimizer=changes.pop("optimizer", {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}}),
        **changes,
    )
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)


def metrics(out_dir: Path) -> list[dict[str, float]]:
    """Rows of the newest CSV log, each without its empty cells."""
    log = max((out_dir / "logs" / "csv").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with log.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def rows(out_dir: Path) -> list[dict[str, str]]:
    """Of the last log, without what depends on the machine."""
    logs = (out_dir / "logs" / "csv").glob("version_*/metrics.csv")
    with max(logs, key=lambda path: int(path.parent.name.split("_")[1])).open(newline="") as file:
        found = list(csv.DictReader(file))
    varying = ("tokens_per_second", "response_tokens_per_second", "seconds_per_step", "memory_gb")
    return [{name: value for name, value in row.items() if name not in varying} for row in found]


def final(out_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)


def assert_same(one: Path, other: Path) -> None:
    weights = final(other)
    assert all(torch.equal(weights[name], weight) for name, weight in final(one).items())
    assert rows(one) == rows(other)


def difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def gpt(directory) -> GPT:
    model = GPT(Config.from_file(directory / "model_config.yaml"))
    model.load_state_dict(torch.load(directory / "lit_model.pth", weights_only=True))
    return model


FEW = GenerationArgs(seeds=[10, 20], max_new_tokens=12, batch_size=3)


def evaluate(student: Path, teacher: Path, data, out_dir: Path, **options) -> dict:
    torch.set_num_threads(1)
    data = alice(data) if isinstance(data, Path) else data
    options = {"max_records": 7, "generation": FEW, **options}
    evaluate_akl(student, teacher_checkpoint_dir=teacher, data=data, out_dir=out_dir, **options)
    return json.loads((out_dir / "evaluation.json").read_text())
