"""What a run shows: a progress line, the logger's metrics, and which noise of other libraries is kept away."""

import dataclasses
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.loggers import CSVLogger, Logger
from lightning.fabric.loggers.logger import rank_zero_experiment
from litgpt.args import LogArgs
from litgpt.types import LoggerChoice
from litgpt.utils import choose_logger

from litgpt_akl.data.steps import StepBatch
from litgpt_akl.memory.process import MemoryWatch
from litgpt_akl.messages import UserError, fitted, progress_bar, reason, shown, tell
from litgpt_akl.training.metrics import MetricsFile, copy_marked_rows


class SpeakingFabric(L.Fabric):
    """Lightning's, except that what it prints is fit to be shown, whatever is quoted in it."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._fails: dict[Logger, bool] = {}
        """Of each logger that has taken a row, whether it has failed since."""

    def print(self, *texts, **options) -> None:
        super().print(*(fitted(shown(text), sys.stdout) for text in texts), **options)

    def log_dict(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics to all loggers; of one that has begun and then fails it is told once, and the run goes on."""
        for logger in self.loggers:
            try:
                logger.log_metrics(metrics=dict(metrics), step=step)
            except Exception as error:
                # the first row fails by a mistake of whoever asked for this logger
                if logger not in self._fails:
                    raise
                if not self._fails[logger]:
                    tell(f"{type(logger).__name__} fails ({reason(error)}): what follows may be missing there.")
                self._fails[logger] = True
            else:
                self._fails.setdefault(logger, False)


class Progress:
    """The progress line and the metrics of training steps."""

    def __init__(self, fabric: L.Fabric, total_steps: int, first_step: int) -> None:
        self.fabric = fabric
        self._first, self._total, self._begun = first_step, total_steps, time.perf_counter()
        options = {"bar_format": "{desc}", "dynamic_ncols": True, "disable": not fabric.is_global_zero}
        # a file has lines of its own, in which nothing is renewed
        self.bar = progress_bar(total=total_steps, initial=first_step, **options) if sys.stderr.isatty() else None
        self._line_written = self._step_written = -math.inf
        self._memory = MemoryWatch() if fabric.device.type == "cpu" else None
        self._start_counting()

    def _start_counting(self) -> None:
        self._time, self._tokens, self._padded, self._response_tokens, self._steps = time.perf_counter(), 0, 0, 0, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no part of a step: its time is in none of the metrics."""
        began = time.perf_counter()
        yield
        self._time += time.perf_counter() - began

    def step(self, step_batch: StepBatch) -> None:
        """One optimizer step was taken."""
        self._tokens += step_batch.tokens
        self._padded += step_batch.padded_tokens
        self._response_tokens += step_batch.response_tokens
        self._steps += 1

    def log(self, state: dict, means: dict[str, float]) -> None:
        """Send the last step's means, with what is known here, to the logger and to the progress line."""
        seconds = time.perf_counter() - self._time
        metrics = {
            **means,
            "learning_rate": state["learning_rate"],
            "step": state["step_count"],
            "epoch": state["epoch"],
            "tokens": state["tokens"],
            "padding": 1 - self._tokens / self._padded,
            "tokens_per_second": self._tokens / seconds,
            "response_tokens_per_second": self._response_tokens / seconds,
            "seconds_per_step": seconds / self._steps,
        }
        device = self.fabric.device
        if device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            # what the allocator holds, with what lies idle in the pools of its streams: this is what a GPU must have
            metrics["memory_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
        else:
            metrics["memory_gb"] = max(0, self._memory.look() - state["memory_before"]) / 1e9
        on_policy_samples = state["on_policy_samples"]
        if on_policy_samples is not None:
            metrics["own_answers_time"] = on_policy_samples.seconds / seconds
            on_policy_samples.seconds = 0.0
        self._start_counting()
        self.fabric.log_dict(metrics, step=state["step_count"])
        self._show(metrics)

    def within_step(self, step: int, done: int, total: int) -> None:
        """Say how far a step is that takes long, so that nobody takes the run for one that hangs."""
        now = time.perf_counter()
        if now - max(self._line_written, self._begun) < LINE_SECONDS or done == total:
            return
        taken, so_far = done / total, now - self._begun
        left = so_far / (step - 1 - self._first + taken) * (self._total - step + 1 - taken)
        line = f"{_of_all(step, self._total)}  micro-batch {done} of {total}  left {_minutes(left):>7}"
        if self.bar is not None:
            self.bar.set_description_str(line)
        else:
            self._line_written = now
            self.write(line)

    def _show(self, metrics: dict[str, float]) -> None:
        """Renew the line of a terminal, or add one to a file, of the first step, of the last and every ten seconds."""
        now, step = time.perf_counter(), metrics["step"]
        left = (now - self._begun) / (step - self._first) * (self._total - step)
        line = progress_line(metrics, self._total, left)
        if self.bar is not None:
            self._line_written = now
            self.bar.update(step - self.bar.n)
            self.bar.set_description_str(line, refresh=step == self._total)
        elif now - self._step_written >= LINE_SECONDS or step == self._total:
            # lines from within a step do not stand in for its own
            self._line_written = self._step_written = now
            self.write(line)

    def write(self, text: str) -> None:
        """Print a line above the progress line."""
        if self.fabric.is_global_zero:
            tell(text)

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
        if self.bar is not None:
            self.bar.close()


LINE_SECONDS = 10.0
"""From one line in a file to the next."""


def progress_line(metrics: dict[str, float], total: int, seconds_left: float) -> str:
    """A step in columns of one width, fewer than 80 together; ``seconds_left`` are those of the run."""
    cells = [
        f"{_of_all(metrics['step'], total)} {metrics['step'] / total:4.0%}",
        f"loss {metrics['loss']:6.3f}",
        f"{metrics['tokens_per_second']:7,.0f} tok/s",
        f"{metrics['memory_gb']:5.1f} GB",
        f"left {_minutes(seconds_left):>7}",
    ]
    if "own_answers_time" in metrics:
        # on a GPU as on a CPU memory is what changes least
        cells[3] = f"{metrics['own_answers_time']:4.0%} on-policy"
    return "  ".join(cells)


def _of_all(step: int, total: int) -> str:
    return f"step {step:>{len(str(total))}}/{total}"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{rest:02}s"


def silence_known_noise() -> None:
    """Warnings of other libraries that say nothing to a user of this command, by its text."""
    # LitGPT's data modules' loaders are only asked for their datasets, their workers never start
    warnings.filterwarnings("ignore", message=r"This DataLoader will create .* worker processes")
    # the random weights of a sharded model give way to those of a file
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")


class MetricsLogger(CSVLogger):
    """LitGPT's CSV logger, whose file may go or its disk be full: that is told, and the run goes on."""

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        if self._experiment is None:
            self._experiment = MetricsFile(Path(self.log_dir) / "metrics.csv", tell)
        return self._experiment

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.tell_losses()

    def _get_next_version(self) -> int:
        """One more than any number there is, be it a file's or one with an ending."""
        with suppress(OSError):
            found = (re.match(r"version_([0-9]{1,9})", name) for name in os.listdir(Path(self.root_dir) / self.name))
            return max((int(number[1]) + 1 for number in found if number), default=0)
        return 0


def make_loggers(
    logger_name: LoggerChoice, out_dir: Path, *, name: str, resume: bool, log_interval: int, log: LogArgs
) -> list[Logger]:
    """LitGPT's logger of that name (UserError if it lacks a package), and its CSV logger, which the report reads."""
    options = {"name": name, "resume": resume, "log_interval": log_interval, "log_args": dataclasses.asdict(log)}
    csv_logger = MetricsLogger(out_dir / "logs", name="csv", flush_logs_every_n_steps=log_interval)
    try:
        return [csv_logger] if logger_name == "csv" else [choose_logger(logger_name, out_dir, **options), csv_logger]
    except ModuleNotFoundError as error:
        raise UserError(f"--logger_name {logger_name} needs a package that is not installed: {error}") from error


def _metrics_file(fabric: L.Fabric) -> MetricsFile | None:
    return next((of.experiment for of in fabric.loggers if isinstance(of, CSVLogger)), None)


def flushed_metrics(fabric: L.Fabric) -> Path | None:
    """The CSV file with all metrics so far, or None in a process that has none."""
    file = _metrics_file(fabric)
    if file is None:
        return None
    file.save()
    return file.path


def continue_metrics(fabric: L.Fabric, checkpoint: Path, step: int) -> None:
    """Let this run's CSV file begin with the rows behind a checkpoint of that step; what is lost is told."""
    file = _metrics_file(fabric)
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        columns, told = copy_marked_rows(checkpoint, step, file.path)
        file.begin_with(columns)
    except OSError as error:
        with suppress(OSError):
            file.path.unlink(missing_ok=True)
        told = f"{file.path} cannot begin with the rows of {checkpoint}: {reason(error)}."
    if told is not None:
        tell(told)
