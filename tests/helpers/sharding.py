"""Runs that are the same in one process and in several."""

from functools import partial

from helpers.ranks import in_processes
from helpers.runs import metrics

RATE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-4}}


UNEVEN = {"max_steps": 10, "global_batch_size": 7, "micro_batch_size": 2, "max_norm": 0.5}
"""Four micro-batches a step, the last of one record."""


def losses_in(precision, run, out_dir, processes):
    """Of each step of a run in that precision, which is not validated."""
    unseen = {"initial_validation": False, "final_validation": False}
    in_processes(processes, partial(run, out_dir, precision=precision, eval=unseen))
    return [row["loss"] for row in metrics(out_dir) if "loss" in row]
