"""The logger that a run was asked for, and a CSV file, which goes on where an interrupted run was saved."""

import csv
import dataclasses
import shutil
from pathlib import Path

import lightning as L
from lightning.fabric.loggers import CSVLogger, Logger
from litgpt.args import LogArgs
from litgpt.types import LoggerChoice
from litgpt.utils import choose_logger

from litgpt_akl.errors import UserError


def make_loggers(
    logger_name: LoggerChoice, out_dir: Path, *, name: str, resume: bool, log_interval: int, log: LogArgs
) -> list[Logger]:
    """LitGPT's logger of that name, and its CSV logger if that is another one: the report reads the CSV file.

    Raises:
        UserError: a package that it needs is not installed.
    """
    options = {"name": name, "resume": resume, "log_interval": log_interval, "log_args": dataclasses.asdict(log)}
    try:
        return [choose_logger(choice, out_dir, **options) for choice in dict.fromkeys((logger_name, "csv"))]
    except ModuleNotFoundError as error:
        raise UserError(f"--logger_name {logger_name} needs a package that is not installed: {error}") from error


def flushed_metrics(fabric: L.Fabric) -> Path | None:
    """The CSV file with all metrics so far, or None in a process that has none."""
    for logger in fabric.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
            return Path(logger.experiment.metrics_file_path)
    return None


def continue_metrics(fabric: L.Fabric, saved: Path) -> None:
    """Let this run's CSV file begin with the rows that a checkpoint holds, so that none is missing or comes twice."""
    for logger in fabric.loggers:
        if isinstance(logger, CSVLogger) and saved.is_file():
            with saved.open(newline="") as file:
                columns = next(csv.reader(file))
            shutil.copyfile(saved, logger.experiment.metrics_file_path)
            logger.experiment.metrics_keys = columns
