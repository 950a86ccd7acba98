"""The logger that a run was asked for, and a CSV file, which goes on where an interrupted run was saved."""

import dataclasses
import os
import re
from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.fabric.loggers import CSVLogger, Logger
from lightning.fabric.loggers.logger import rank_zero_experiment
from litgpt.args import LogArgs
from litgpt.types import LoggerChoice
from litgpt.utils import choose_logger

from litgpt_akl.messages import UserError, reason, tell
from litgpt_akl.training.metrics import copy_marked_rows
from litgpt_akl.training.metrics_file import MetricsFile


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
    """LitGPT's logger of that name, and its CSV logger if that is another one: the report reads the CSV file.

    Raises:
        UserError: a package that it needs is not installed.
    """
    options = {"name": name, "resume": resume, "log_interval": log_interval, "log_args": dataclasses.asdict(log)}
    csv_logger = MetricsLogger(out_dir / "logs", name="csv", flush_logs_every_n_steps=log_interval)
    try:
        return [csv_logger] if logger_name == "csv" else [choose_logger(logger_name, out_dir, **options), csv_logger]
    except ModuleNotFoundError as error:
        raise UserError(f"--logger_name {logger_name} needs a package that is not installed: {error}") from error


def flushed_metrics(fabric: L.Fabric) -> Path | None:
    """The CSV file with all metrics so far, or None in a process that has none."""
    for logger in fabric.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
            return logger.experiment.path
    return None


def continue_metrics(fabric: L.Fabric, checkpoint: Path, step: int) -> None:
    """Let this run's CSV file begin with the rows behind a checkpoint of that step; what is lost is told."""
    for logger in fabric.loggers:
        if isinstance(logger, CSVLogger):
            log = logger.experiment.path
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                columns, told = copy_marked_rows(checkpoint, step, log)
                logger.experiment.begin_with(columns)
            except OSError as error:
                with suppress(OSError):
                    log.unlink(missing_ok=True)
                told = f"{log} cannot begin with the rows of {checkpoint}: {reason(error)}."
            if told is not None:
                tell(told)
