"""How well models do tasks of lm-eval (the LM Evaluation Harness), and how much of it a student has of its teacher."""

import logging
import math
from difflib import get_close_matches
from statistics import fmean
from typing import Any

import lightning as L
from litgpt.model import GPT

from litgpt_akl.messages import UserError, tell
from litgpt_akl.models.tokenizer import OneBosTokenizer

BOOTSTRAPS = 1000
"""Resamplings for the standard errors of metrics that have no formula of their own."""


class Tasks:
    """Tasks of lm-eval, read once for all models.

    Args:
        names: of tasks, groups or tags that lm-eval knows, or paths of YAML files of tasks, with commas between them.
        limit: how many questions of each task are asked, from the first on; None for all.
        num_fewshot: solved examples before each question, where a task does not fix it to 0 (default: as a task says).

    Raises:
        UserError: lm-eval is not installed, does not know a task, or cannot read its questions.
    """

    def __init__(self, names: str, limit: int | None, num_fewshot: int | None) -> None:
        _find_lm_eval(names)
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.names, self.limit, self.num_fewshot = [name.strip() for name in names.split(",")], limit, num_fewshot
        known = [name for name in self.names if not name.endswith((".yaml", ".yml"))]
        # looking through lm-eval's own tasks takes seconds
        self._manager = TaskManager(include_defaults=bool(known))
        for name in known:
            if name not in self._manager.task_index:
                close = get_close_matches(name, self._manager.all_tasks, n=1)
                way_out = f"Did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists what there is."
                raise UserError(f"--tasks {name}: lm-eval has no such task, and it is no YAML file of one.\n{way_out}")

    def read(self) -> None:
        """Read the questions, which lm-eval may have to download."""
        found: dict[str, Any] = {}
        for name in self.names:
            try:
                part = self._manager.load([name])
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"--tasks {name}: its questions cannot be read ({type(error).__name__}: {reason}).\n"
                    "Give a YAML file of a task whose data is here, or leave it out of --tasks."
                ) from error
            found |= part["tasks"]
        self.tasks = found
        self.chance = {name: chance for name, task in found.items() if (chance := self._chance(task)) is not None}
        """Share of right answers of somebody who guesses, for tasks with choices."""

    def _chance(self, task: Any) -> float | None:
        if task.OUTPUT_TYPE != "multiple_choice":
            return None
        documents = task.eval_docs
        number = len(documents) if self.limit is None else min(self.limit, len(documents))
        return fmean(1 / len(task.doc_to_choice(documents[place])) for place in range(number))

    def measure(
        self, fabric: L.Fabric, model: GPT, tokenizer: OneBosTokenizer, vocab_size: int, batch_size: int, name: str
    ) -> dict[str, dict[str, float]]:
        """What lm-eval finds of a model: by task, its metrics and their standard errors.

        All processes ask together; only the first has the answer, others an empty one.

        Args:
            fabric: of the run.
            model: from :func:`~litgpt_akl.models.gpt.load_frozen`.
            tokenizer: the model's.
            vocab_size: ids from here on are padding.
            batch_size: texts that a process reads together.
            name: of the model, for the progress line.
        """
        from lm_eval import simple_evaluate

        from litgpt_akl.training.task_model import TaskModel

        asked = TaskModel(fabric, model, tokenizer, vocab_size, batch_size, name)
        found = simple_evaluate(
            asked,
            tasks=[*self.tasks.values()],
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            task_manager=self._manager,
        )
        if found is None:
            return {}
        if asked.cut:
            tell(f"{name}: {asked.cut:,} prompts of tasks lost their begin beyond {asked.max_length:,} tokens")
        return {task: _metrics(found["results"][task]) for task in self.tasks}


def _find_lm_eval(names: str) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tasks {names} needs lm-eval, which is not installed ({error}).\n"
            "Run: pip install lm-eval, or leave --tasks out."
        ) from None


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval's entries ``metric,filter`` under short names, those of standard errors with ``_stderr`` at their end."""
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def main_metric(metrics: dict[str, float]) -> str:
    """The metric of a task that counts in the mean: accuracy by length-normalised likelihood, where there is one."""
    return next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics)))


def recovered(student: float, teacher: float, chance: float) -> float:
    """The share of the teacher's accuracy above chance that the student has; NaN if the teacher has none."""
    return (student - chance) / (teacher - chance) if teacher > chance else math.nan


def summary(found: dict[str, dict[str, dict[str, float]]], chance: dict[str, float]) -> dict[str, dict[str, float]]:
    """The mean accuracy of each role over tasks with choices, its standard error, and the share recovered."""
    roles = {role: [tasks[name] for name in chance] for role, tasks in found.items() if chance}
    means = {}
    for role, tasks in roles.items():
        errors = [metrics.get(f"{main_metric(metrics)}_stderr", math.nan) for metrics in tasks]
        means[role] = {
            "accuracy": fmean(metrics[main_metric(metrics)] for metrics in tasks),
            "stderr": math.sqrt(sum(error**2 for error in errors)) / len(tasks),
        }
    for role in set(means) - {"teacher"}:
        values = means[role]["accuracy"], means["teacher"]["accuracy"], fmean(chance.values())
        means[role]["recovered"] = recovered(*values)
    return means


def task_table(found: dict[str, dict[str, dict[str, float]]], chance: dict[str, float]) -> str:
    """A line for each metric of each task: every model's value with its standard error, chance, the share recovered."""
    roles = [role for role in ("before", "student", "teacher") if role in found]
    lines = [f"{'':26}" + "".join(f"{role:>14}" for role in roles) + f"{'kept':>8}"]

    def line(label: str, cells: list[tuple[float, float]], share: float) -> str:
        text = "".join(f"{f'{value:.3f}':>8}" + (f" ±{e:.3f}" if e == e else " " * 6) for value, e in cells)
        return f"{label[:26]:26}{text}" + ("" if math.isnan(share) else f"{share:>8.0%}")

    for task in found["teacher"]:
        for metric in [name for name in found["teacher"][task] if "_stderr" not in name]:
            values = [found[role][task] for role in roles]
            cells = [(of[metric], of.get(_error_name(metric), math.nan)) for of in values]
            counts = task in chance and metric in ("acc", "acc_norm")
            share = recovered(cells[-2][0], cells[-1][0], chance[task]) if counts else math.nan
            lines.append(line(f"{task} {metric}", cells, share))
    if len(chance) > 1:
        means = summary(found, chance)
        cells = [(means[role]["accuracy"], means[role]["stderr"]) for role in roles]
        lines.append(
            line(f"mean of {len(chance)} (chance {fmean(chance.values()):.3f})", cells, means["student"]["recovered"])
        )
    return "\n".join(lines)


def _error_name(metric: str) -> str:
    name, comma, of = metric.partition(",")
    return f"{name}_stderr{comma}{of}"
