"""The logger that a run was asked for, and a CSV file, which goes on where an interrupted run was saved."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.fabric.loggers import CSVLogger, Logger
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from litgpt.args import LogArgs
from litgpt.types import LoggerChoice
from litgpt.utils import choose_logger

from litgpt_akl.errors import UserError
from litgpt_akl.metrics import copy_marked_rows


class _MetricsWriter(_ExperimentWriter):
    """Lightning's writer, whose file is whole at any moment: checkpoints have no copy of it."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            shutil.copyfile(path, partial)
            self.metrics_file_path = str(partial)
            super()._rewrite_with_new_header(fieldnames)
            partial.replace(path)
        finally:
            self.metrics_file_path = str(path)
            partial.unlink(missing_ok=True)


class MetricsLogger(CSVLogger):
    """LitGPT's CSV logger; a run that is killed while a column is added loses no row."""

    @property
    @rank_zero_experiment
    def experiment(self) -> _MetricsWriter:
        if self._experiment is None:
            self._experiment = _MetricsWriter(self.log_dir)
        return self._experiment


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
            return Path(logger.experiment.metrics_file_path)
    return None


def continue_metrics(fabric: L.Fabric, checkpoint: Path, step: int, tell: Callable[[str], None]) -> None:
    """Let this run's CSV file begin with the rows behind a checkpoint of that step; ``tell`` is told what is lost."""
    for logger in fabric.loggers:
        if isinstance(logger, CSVLogger):
            log = Path(logger.experiment.metrics_file_path)
            try:
                columns, told = copy_marked_rows(checkpoint, step, log)
            except OSError as error:
                log.unlink(missing_ok=True)
                columns, told = [], f"{log} cannot begin with the rows of {checkpoint}: {error.strerror}."
            logger.experiment.metrics_keys = columns
            if told is not None:
                tell(told)
