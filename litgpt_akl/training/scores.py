"""What was measured of a teacher's parts on calibration records, kept in a file: students of other sizes start from it.

The file is safetensors, with the scores as tensors, and what they are of and the order of removed layers as metadata.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.files.reading import explain_damage, with_checksum, without_checksum
from litgpt_akl.messages import UserError
from litgpt_akl.models.depth import Removal
from litgpt_akl.models.importance import Importance
from litgpt_akl.models.layerwise import Sample

ENTRY = "litgpt_akl.scores"
"""Of the metadata, with JSON in it."""
WAY_OUT = "Name another file by --scores, or remove this one."


class Scores:
    """Importance of a teacher's parts, and the layers that were removed one at a time; in a file, if one is named.

    ``identity`` is all that they depend on: teacher, records, precision.

    Raises:
        UserError: the file is of something else, damaged, or cannot be written.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self._identity = path, identity
        self.importance: Importance | None = None
        self.is_read = path is not None and path.exists()
        """Whether the file was there."""
        self._removed: dict[str, list[Removal]] = {}
        if self.is_read:
            self._read(path)

    def removed(self, records: int, keep_ends: bool) -> list[Removal]:
        """The layers that were removed so far, in order, by forward KL on so many of the records."""
        return self._removed.get(f"{records} {keep_ends}", [])

    def keep_removed(self, records: int, keep_ends: bool, removed: list[Removal]) -> None:
        """Remember the layers that were removed, and write the file."""
        self._removed[f"{records} {keep_ends}"] = removed
        self._write()

    def keep_importance(self, importance: Importance) -> None:
        """Remember the importance of all parts, and write the file."""
        self.importance = importance
        self._write()

    def _read(self, path: Path) -> None:
        with explain_damage(path, "scores of make_student", WAY_OUT):
            with safe_open(path, framework="pt") as file:
                content = without_checksum(json.loads((file.metadata() or {})[ENTRY]), required=True)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if content["tensors"] != _digest(tensors):
                raise ValueError("its checksum is wrong")
            known = content["identity"]
        if changed := {name: value for name, value in self._identity.items() if known.get(name) != value}:
            told = "; ".join(f"{name} {known.get(name)} -> {value}" for name, value in changed.items())
            raise UserError(f"--scores {path} is of something else: {told}.\n{WAY_OUT}")
        self.importance = _from_tensors(tensors) if tensors else None
        for key, removed in content["removed"].items():
            self._removed[key] = [Removal(**removal) for removal in removed]

    def _write(self) -> None:
        if self.path is None:
            return
        tensors = {} if self.importance is None else _as_tensors(self.importance)
        removed = {key: [removal._asdict() for removal in found] for key, found in self._removed.items()}
        content = {"identity": self._identity, "removed": removed, "tensors": _digest(tensors)}
        data = safetensors.torch.save(tensors, {ENTRY: json.dumps(with_checksum(content))})
        with explain_failure(self.path):
            write_file(self.path, data)


def digest_samples(samples: Sequence[Sample]) -> str:
    """Tells samples apart by their ids, and by which of them count."""
    digest = xxhash.xxh3_128()
    for sample in samples:
        for tensor in (sample.input_ids, sample.positions):
            digest.update(len(tensor).to_bytes(8))
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _as_tensors(importance: Importance) -> dict[str, Tensor]:
    found = {}
    for kind, scores in asdict(importance).items():
        parts = scores.items() if isinstance(scores, dict) else [("", scores)]
        found |= {f"{kind} {name}".strip(): part for name, part in parts}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _from_tensors(tensors: dict[str, Tensor]) -> Importance:
    parts = {kind: {} for kind in ("mlp", "heads", "experts", "energy")}
    for name, tensor in tensors.items():
        kind, _, part = name.partition(" ")
        if part:
            parts[kind][part] = tensor
    return Importance(blocks=tensors["blocks"], width=tensors["width"], **parts)
