"""Results on disk, each found again by all that it depends on."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from comparison.methods import Settings
from litgpt_akl.files.directories import write_file


@dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    options: tuple[tuple[str, str | float], ...]
    """Of ``DistillArgs``, by name."""
    rate: float
    """The highest learning rate."""
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, lr {self.rate:g}, seed {self.seed}"


class Store:
    """The results in a folder, one directory for each run: what training gave, the student, what its test gave.

    Args:
        folder: where they are.
        settings: results of other settings are there, too, and not found.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        packages = ("torch", "litgpt", "litgpt-akl")
        self.versions = {name: version(name) for name in packages}

    def training_key(self, run: Run) -> dict:
        """All that the result of a training depends on."""
        names = ("pair", "steps", "batch", "train_records", "validation_records")
        common = {name: getattr(self.settings, name) for name in names}
        return common | {
            "options": dict(run.options),
            "rate": run.rate,
            "seed": run.seed,
            "versions": self.versions,
        }

    def test_key(self, run: Run) -> dict:
        """All that the result of a test depends on."""
        names = ("test_records", "prompts", "new_tokens")
        return self.training_key(run) | {name: getattr(self.settings, name) for name in names}

    def directory(self, run: Run) -> Path:
        digest = hashlib.sha256(json.dumps(self.training_key(run), sort_keys=True).encode()).hexdigest()[:8]
        return self.folder / f"{run.method}-lr{run.rate:g}-seed{run.seed}-{digest}"

    def student(self, run: Run) -> Path:
        return self.directory(run) / "student"

    def training(self, run: Run) -> dict | None:
        """What a training gave, or None."""
        return _read(self.directory(run) / "training.json", self.training_key(run))

    def test(self, run: Run) -> dict | None:
        """What a test gave, or None."""
        return _read(self.directory(run) / "test.json", self.test_key(run))

    def write_training(self, run: Run, result: dict) -> None:
        _write(self.directory(run) / "training.json", self.training_key(run), result)

    def write_test(self, run: Run, result: dict) -> None:
        _write(self.directory(run) / "test.json", self.test_key(run), result)

    def remove_student(self, run: Run) -> None:
        shutil.rmtree(self.student(run), ignore_errors=True)


def _read(path: Path, key: dict) -> dict | None:
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["result"] if content["key"] == key else None


def _write(path: Path, key: dict, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"key": key, "result": result}, indent=1).encode())
