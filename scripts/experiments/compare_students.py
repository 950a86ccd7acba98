"""Compares students of several sizes: how much of the teacher is left at once, and after some steps of distillation.

    python scripts/experiments/tasks.py
    python scripts/experiments/compare_students.py                        # hours: 18 trainings, 27 looks at a student
    python scripts/experiments/compare_students.py --shares 0.8 --steps 0 100 --task_limit 200   # the quick version

The teacher is SmolLM2-135M-Instruct, the records are the demo's. Students of each share of its parameters are made by
`litgpt make_student` in three ways: evenly spread layers, layers that are chosen, and the best of several candidates of
fewer layers and narrower ones. Each is trained by forward KL, and looked at as `litgpt evaluate_akl` would: forward KL
to the teacher, agreement of the top-1 ids, accuracy in tasks. All students read the teacher's hidden states from one
cache. What is finished is kept in --out: the same command goes on where it was interrupted. It ends with
`students.json`, `students.md` and `students.png` there.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.prompts import Default, PromptStyle

from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.commands.make_student import make_student
from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.files.directories import write_file
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.messages import say
from litgpt_akl.models.generation import generate
from litgpt_akl.models.gpt import load_frozen
from litgpt_akl.models.model_size import measure_size
from litgpt_akl.models.pair import Pair, check_pair
from litgpt_akl.training.task_accuracy import Tasks, recovered, summary
from litgpt_akl.training.validation import measure

METHODS = {"even": "even depth", "depth": "chosen depth", "search": "search over depth and width"}
PROMPT, DECODED = 32, 64
"""Tokens of the prompt, and of the answer by which the speed is measured."""


def records(given: argparse.Namespace) -> JSON:
    style = PromptStyle.from_name(given.prompt_style) if given.prompt_style else Default()
    return JSON(json_path=given.data, mask_prompt=True, prompt_style=style, num_workers=0)


def make(given: argparse.Namespace, method: str, share: float) -> Path:
    """The untrained student of a share of the teacher's parameters; it is made if it is not there."""
    student = given.out / "students" / f"{method}-{share:g}"
    if student.is_dir():
        return student
    options: dict[str, Any] = {}
    if method != "even":
        options = {"data": records(given), "records": given.records, "kl_records": given.kl_records}
        options["scores"] = given.out / "scores.safetensors"
    if method == "search":
        options |= {"candidates": given.candidates, "trial_steps": given.trial_steps}
    make_student(given.teacher, student, params=share, **options)
    return student


def train(given: argparse.Namespace, student: Path, steps: int, seed: int) -> Path:
    """The student after so many steps of 8 records; what an interrupted call has done is not done again."""
    run = given.out / "run"
    setup(
        student,
        teacher_checkpoint_dir=given.teacher,
        data=records(given),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": given.lr}},
        out_dir=run,
        resume="auto",
        save_minutes=5.0,
        seed=seed,
        teacher=TeacherArgs(cache_dir=str(given.out / "cache")),
        distill=DistillArgs(divergence="fkl", kd_ratio=1.0),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=8,
            micro_batch_size=8,
            lr_warmup_steps=None,
            epochs=None,
            max_steps=steps,
            max_norm=1.0,
            min_lr=0.0,
        ),
        eval=EvalArgs(interval=steps + 1, max_iters=4, final_validation=False),
    )
    return run / "final"


class Looking:
    """Looks at students beside their teacher, as `litgpt evaluate_akl` does, which would ask the teacher each time."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.fabric = L.Fabric(devices=1, precision="32-true")
        self.given, self.tasks = given, None
        if given.tasks:
            self.tasks = Tasks(given.tasks, given.task_limit, None)
            self.tasks.read()

    def look(self, directory: Path) -> dict[str, float]:
        """What is found of a student, or of the teacher itself."""
        pair = check_pair(directory, self.given.teacher, None)
        student, teacher = (
            load_frozen(self.fabric, where, config, torch.float32)
            for where, config in ((directory, pair.student_config), (pair.teacher_dir, pair.teacher_config))
        )
        dataset = self._held_out(pair)
        numbers = range(min(self.given.held_out, len(dataset)))
        known = {"micro_batch": (8, None), "vocab_size": pair.vocab_size, "name": directory.name}
        loss = DistillationLoss(divergence="akl", kd_ratio=1.0)
        found = measure(self.fabric, student, teacher, loss, dataset, numbers, **known).student
        result = {name: found[name] for name in ("forward_kl", "agreement")}
        if self.tasks is not None:
            by_task = self.tasks.measure(self.fabric, student, pair.tokenizer, pair.vocab_size, 8, directory.name)
            means = summary({"student": by_task, "teacher": by_task}, self.tasks.chance)["student"]
            result |= {name: means[name] for name in ("accuracy", "stderr")}
            result["chance"] = statistics.fmean(self.tasks.chance.values())
        tied = torch.equal(student.lm_head.weight, student.transformer.wte.weight)
        result["parameters"] = measure_size(pair.student_config, tied).whole
        prompt = dataset.read([0])[0]["input_ids"][:PROMPT]
        return {**result, "tokens_per_second": self._speed(student, prompt, pair.vocab_size)}

    def _held_out(self, pair: Pair):
        known = {"teacher_dir": pair.teacher_dir, "vocab_size": pair.vocab_size}
        options = TrainArgs(micro_batch_size=8), pair.context_length, pair.student_dir
        return prepare_datasets(records(self.given), pair.tokenizer, *options, **known)[1]

    def _speed(self, model: torch.nn.Module, prompt: torch.Tensor, vocab_size: int) -> float:
        """Tokens of an answer in a second, the median of three, with one before."""
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            generate(self.fabric, model, [prompt], max_new_tokens=DECODED, stop=[], vocab_size=vocab_size)
            seconds.append(time.perf_counter() - began)
        return DECODED / statistics.median(seconds[1:])


def looks(given: argparse.Namespace) -> Iterator[tuple[str, float, int, int | None]]:
    """What is looked at: method, share, steps and seed, those first that say something soonest."""
    for steps in given.steps:
        for seed in given.seeds if steps else [None]:
            for share in given.shares:
                yield from ((method, share, steps, seed) for method in given.methods)


def compare(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "students.json"
    results: dict[str, dict] = json.loads(path.read_text()) if path.is_file() else {}
    looking, todo = Looking(given), [*looks(given)]

    def keep(name: str, found: dict) -> None:
        results[name] = found
        write_file(path, json.dumps(results, indent=1).encode())

    if "teacher" not in results:
        keep("teacher", looking.look(given.teacher))
    for number, (method, share, steps, seed) in enumerate(todo, start=1):
        name = f"{method} {share:g} {steps} {seed}"
        if name in results:
            continue
        say(f"\n{number} of {len(todo)}: {METHODS[method]}, {share:.0%} of the parameters, {steps} steps, seed {seed}")
        student, began = make(given, method, share), time.perf_counter()
        if steps:
            student = train(given, student, steps, seed)
        described = {"method": method, "share": share, "steps": steps, "seed": seed}
        keep(name, {**described, **looking.look(student), "seconds": time.perf_counter() - began})
        # weights of a student that was looked at are not needed again
        shutil.rmtree(given.out / "run", ignore_errors=True)
    text = table(results, given)
    (given.out / "students.md").write_text(text + "\n")
    if find_spec("matplotlib") is not None:
        draw(results, given, given.out / "students.png")
    say(text)


def mean_of(found: list[dict], name: str) -> tuple[float, float]:
    """The mean over seeds, and their standard deviation; NaN if it is not known."""
    values = [each[name] for each in found if name in each]
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def chosen(results: dict[str, dict], **wanted) -> list[dict]:
    found = (each for name, each in results.items() if name != "teacher")
    return [each for each in found if all(each[name] == value for name, value in wanted.items())]


def table(results: dict[str, dict], given: argparse.Namespace) -> str:
    """Means over seeds and their standard deviation; with one seed accuracy has the questions' standard error."""
    teacher = results["teacher"]
    columns = "parameters | made by | steps | forward KL | agreement | accuracy | kept | tokens/s"
    lines = [f"| {columns} |", "|---" * 8 + "|"]

    def cell(found: list[dict], name: str, form: str) -> str:
        mean, deviation = mean_of(found, name)
        if math.isnan(mean):
            return ""
        return format(mean, form) + ("" if math.isnan(deviation) else f" ± {format(deviation, form)}")

    def line(of: list[dict], label: str, steps: str) -> str:
        cells = [f"{mean_of(of, 'parameters')[0] / 1e6:.1f} M", label, steps]
        cells += [cell(of, "forward_kl", ".3f"), cell(of, "agreement", ".3f"), cell(of, "accuracy", ".3f"), ""]
        if cells[-2]:
            share = recovered(mean_of(of, "accuracy")[0], teacher["accuracy"], teacher["chance"])
            # that of the questions; between seeds it is in the cell already
            cells[-2:] = [cells[-2] + (f" ± {of[0]['stderr']:.3f}" if len(of) == 1 else ""), f"{share:.0%}"]
        return f"| {' | '.join([*cells, cell(of, 'tokens_per_second', '.1f')])} |"

    lines.append(line([teacher], "the teacher", ""))
    for share in given.shares:
        for steps in given.steps:
            for method in given.methods:
                if of := chosen(results, share=share, steps=steps, method=method):
                    lines.append(line(of, METHODS[method], f"{steps:,}"))
    return "\n".join(lines)


def draw(results: dict[str, dict], given: argparse.Namespace, path: Path) -> None:
    """Accuracy, or without tasks the forward KL, against parameters and against speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quality, teacher = "accuracy" if "accuracy" in results["teacher"] else "forward_kl", results["teacher"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    colors = dict(zip(METHODS, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    dashes = dict(zip(given.steps, (":", "--", "-", "-."), strict=False))
    for axis, (name, label, unit) in zip(
        axes, [("parameters", "parameters, M", 1e6), ("tokens_per_second", "tokens/s of one answer", 1)], strict=True
    ):
        for method in given.methods:
            for steps in given.steps:
                of = [chosen(results, share=share, steps=steps, method=method) for share in given.shares]
                points = sorted((mean_of(each, name)[0] / unit, mean_of(each, quality)[0]) for each in of if each)
                style = {"color": colors[method], "linestyle": dashes.get(steps, "-"), "marker": "o"}
                axis.plot(*zip(*points, strict=True), label=f"{METHODS[method]}, {steps:,} steps", **style)
        axis.plot(teacher[name] / unit, teacher[quality], "k*", markersize=12, label="teacher")
        axis.set_xlabel(label)
    axes[0].set_ylabel("mean accuracy in tasks" if quality == "accuracy" else "forward KL, nats a token")
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(".demo")
    parser.add_argument("--teacher", type=Path, default=demo / "SmolLM2-135M-Instruct", help="a LitGPT checkpoint")
    parser.add_argument("--data", type=Path, default=demo / "piqa", help="a directory of train.json and val.json")
    parser.add_argument("--prompt_style", default="smollm2", help="'' for the bare record (default: smollm2)")
    parser.add_argument("--tasks", help="files of lm-eval's tasks (default: those of .demo/tasks; '' for none)")
    parser.add_argument("--task_limit", type=int, default=500, help="questions of each task (default: 500)")
    parser.add_argument("--out", type=Path, default=Path(".students"), help="where all is kept (default: .students)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="how students are made")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="of the parameters")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 1000], help="0 is the student as it was made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the training")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW (default: 1e-3)")
    parser.add_argument("--records", type=int, default=128, help="calibration records (default: 128)")
    parser.add_argument("--kl_records", type=int, default=10, help="of which measure the forward KL (default: 10)")
    parser.add_argument("--candidates", type=int, default=12, help="that the search compares (default: 12)")
    parser.add_argument("--trial_steps", type=int, default=50, help="of its best few (default: 50)")
    parser.add_argument("--held_out", type=int, default=200, help="validation records looked at (default: 200)")
    given = parser.parse_args(words)
    if given.tasks is None:
        given.tasks = ",".join(map(str, sorted((demo / "tasks").glob("*.yaml"))))
    return given


if __name__ == "__main__":
    compare(parse())
