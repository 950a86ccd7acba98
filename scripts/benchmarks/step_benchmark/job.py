"""What every runner is told and what it reports. Standard library only: it is read in the peers' environments, too."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROWS = 6
"""Records in an optimizer step, which is one micro-batch."""
LEARNING_RATE = 1e-5
THREADS = 2
SEED = 1337
IGNORED = -100


@dataclass
class Job:
    """A pair of models, and the rows of each step."""

    pair: str
    student: str
    """Checkpoint directory of LitGPT, as is ``teacher``."""
    teacher: str
    hf_student: str
    """The same weights for Transformers, as is ``hf_teacher``."""
    hf_teacher: str
    records: str
    """Directory of ``train.json`` and ``val.json``."""
    ordered_records: str
    """The same records, in the order of the steps."""
    logits: str
    """File with the logits that both models must give for the first row."""
    warmup: int
    """Steps at the start that are not measured."""
    steps: list[list[dict[str, list[int]]]]
    """Each step's rows: ``input_ids`` and ``labels``, not yet shifted, -100 at the prompt."""

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        return [row for step in self.steps for row in step]

    @property
    def measured_tokens(self) -> int:
        """Without padding."""
        return sum(len(row["input_ids"]) for step in self.steps[self.warmup :] for row in step)

    @property
    def measured_response_tokens(self) -> int:
        rows = [row for step in self.steps[self.warmup :] for row in step]
        return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def memory_gb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process; its ru_maxrss may be that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def report(job: Job, seconds: list[float], empty_gb: float, settings: str) -> None:
    """Print a run's result as the last line of standard output.

    Args:
        job: what was run.
        seconds: of every step, those of the warm-up first.
        empty_gb: memory before any model was loaded.
        settings: what a reader must know to judge the numbers.
    """
    if len(seconds) != len(job.steps):
        raise RuntimeError(f"{len(seconds)} steps were taken, not {len(job.steps)}")
    measured = [round(value, 4) for value in seconds[job.warmup :]]
    result = {"seconds": measured, "peak": memory_gb("VmHWM"), "empty": empty_gb, "settings": settings}
    print("\n" + json.dumps(result))
