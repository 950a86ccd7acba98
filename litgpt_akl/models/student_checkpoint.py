"""A student's checkpoint directory, written from its teacher's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.config import Config
from litgpt.utils import save_config
from torch import Tensor

from litgpt_akl.files.changed_files import Stamp, check_unchanged, stamp_of
from litgpt_akl.files.directories import explain_failure
from litgpt_akl.files.manifest import write_manifest
from litgpt_akl.files.reading import explain_damage
from litgpt_akl.models.gpt import is_tied
from litgpt_akl.models.model_files import copy_model_files, write_json
from litgpt_akl.models.model_size import ModelSize, measure_size
from litgpt_akl.models.slicing import Kept, slice_weights, write_weights
from litgpt_akl.models.student_config import edit_hf_config, model_type, student_config
from litgpt_akl.models.vocabulary import config_without_padding, count_ids, without_padding
from litgpt_akl.models.weights import model_paths, open_weights, read_config

RECORD = "make_student.json"
"""In the student's directory: how its parts were chosen."""


@dataclass(frozen=True)
class TeacherFiles:
    """A teacher's checkpoint directory, opened: students are made of what is in it."""

    directory: Path
    config: Config
    weights: dict[str, Tensor]
    ids: int
    """That a tokenizer or another file knows; students have rows for no others."""
    tied: bool
    kind: str | None
    """What config.json calls the family, if there is one."""
    stamps: Sequence[Stamp]

    @classmethod
    def open(cls, directory: Path) -> "TeacherFiles":
        """Raises UserError if a file is damaged, or does not fit the others."""
        stamps = [*map(stamp_of, model_paths(directory))]
        config = read_config(directory)
        weights, ids = open_weights(directory, config), count_ids(directory)
        tied = is_tied(directory, weights, None)
        return cls(directory, config, weights, ids, tied, model_type(directory), stamps)

    @property
    def bytes_per_parameter(self) -> int:
        """Of the weights of its students, in the widest of the types that its own weights have."""
        return max(tensor.dtype.itemsize for tensor in self.weights.values())

    def config_of(self, layers: Sequence[int], sizes: dict[str, int]) -> Config:
        """The configuration of a student with these layers and sizes."""
        return student_config(config_without_padding(self.config, self.ids), layers, sizes)

    def size_of(self, layers: Sequence[int], sizes: dict[str, int]) -> ModelSize:
        """The size of such a student."""
        return measure_size(self.config_of(layers, sizes), self.tied)

    def write_student(
        self, student_dir: Path, out_dir: Path, kept: Kept, sizes: dict[str, int], record: dict[str, Any] | None
    ) -> None:
        """Write a student into an empty directory that may be renamed to ``out_dir``, which messages name.

        Raises:
            UserError: the directory cannot be written, or somebody has changed the teacher meanwhile.
        """
        with explain_failure(out_dir):
            copy_model_files(self.directory, student_dir)
            config = self.config_of(kept.layers, sizes)
            save_config(config, student_dir)
            if (student_dir / "config.json").is_file():
                with explain_damage(self.directory / "config.json", "the teacher's configuration"):
                    edit_hf_config(student_dir / "config.json", self.config, config, kept.layers)
            if record:
                write_json(student_dir / RECORD, record)
            weights = slice_weights(without_padding(self.weights, self.ids), self.config, kept)
            write_weights(student_dir / "lit_model.pth", weights)
            check_unchanged(self.stamps)
            write_manifest(student_dir, 0, None)
