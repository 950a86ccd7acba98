"""Hidden states that an inference engine wrote: which of its files is of which ids, and what is in one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litgpt_akl.messages import UserError, progress_bar, reason

IDS, STATES = "token_ids", "hidden_states"
"""Names of the tensors in a file, as vLLM's hidden-state connectors write them."""


class EngineFile(NamedTuple):
    """One request's file."""

    path: Path
    tokens: int
    """How many ids it is of."""
    layers: int | None
    """How many layers it has the states of; None if it has no dimension for them."""


class EngineFiles:
    """The safetensors files of a folder and those below it, found by the ids that they are of.

    Each has ``token_ids`` ``[tokens]`` and ``hidden_states`` ``[tokens, layers, width]``, or ``[tokens, width]`` of one
    layer. Their names and their order mean nothing.
    """

    def __init__(self, directory: Path, width: int, layer: int) -> None:
        """Reads the ids of all files; raises UserError for one that is damaged or not as it should be.

        Args:
            directory: the folder.
            width: numbers of a hidden state that the teacher has.
            layer: which of the layers in a file is the last one, before the final norm; -1 is the file's last.
        """
        self.directory, self._width, self._layer = directory, width, layer
        self._by_ids: dict[int, EngineFile] = {}
        self.twice = 0
        """Files of ids that another file has, too: one of them is taken."""
        self.count = 0
        paths = sorted(directory.rglob("*.safetensors"))
        if not paths:
            others = sorted({path.suffix for path in directory.rglob("*") if path.is_file()})
            found = f"only files named *{', *'.join(others)}" if others else "nothing"
            raise UserError(
                f"{directory} holds {found}, and no *.safetensors with {IDS} and {STATES}.\n"
                "Give the folder that the engine wrote to (vLLM: shared_storage_path); unpack *.zst files first."
            )
        for path in progress_bar(paths, desc="reading ids", unit="file", leave=False, delay=1):
            file, ids = self._open(path)
            key = _key(ids)
            self.twice += key in self._by_ids
            self._by_ids.setdefault(key, file)
            self.count += 1

    def find(self, ids: Tensor) -> EngineFile | None:
        """The file of exactly these ids ``[tokens]``."""
        return self._by_ids.get(_key(ids))

    def read(self, file: EngineFile, ids: Tensor, positions: Tensor) -> Tensor:
        """The states ``[n, width]`` of a file's layer at some positions ``[n]``.

        Raises:
            UserError: the file is of other ids by now, is damaged, or a state is not finite.
        """
        with self._explained(file.path), safe_open(file.path, framework="pt") as tensors:
            if not torch.equal(tensors.get_tensor(IDS).long(), ids):
                raise UserError(f"{file.path} was changed while it was being read.\nStart again when nobody writes it.")
            states = tensors.get_slice(STATES)
            states = states[:] if file.layers is None else states[:, self._layer % file.layers]
        states = states[positions]
        if not states.isfinite().all():
            raise UserError(
                f"{file.path} has hidden states that are not finite.\nLet the engine write it again: vLLM does so of"
                " models with several kinds of attention, and in float16."
            )
        return states

    def _open(self, path: Path) -> tuple[EngineFile, Tensor]:
        with self._explained(path), safe_open(path, framework="pt") as tensors:
            names = sorted(tensors.keys())
            if not {IDS, STATES} <= {*names}:
                raise UserError(
                    f"{path} has the tensors {', '.join(names) or 'none'}, and not {IDS} and {STATES}.\n"
                    "Write each record's ids and hidden states under these names, or take the file away."
                )
            ids, shape = tensors.get_tensor(IDS).long(), tensors.get_slice(STATES).get_shape()
        if ids.dim() != 1 or len(shape) not in (2, 3) or shape[0] != len(ids) or shape[-1] != self._width:
            raise UserError(
                f"{path}: {IDS} has the shape {[*ids.shape]} and {STATES} {shape}; the teacher needs [tokens] and"
                f" [tokens, layers, {self._width}].\nGive the files of this teacher, each of one whole request."
            )
        layers = shape[1] if len(shape) == 3 else None
        if layers is not None and not -layers <= self._layer < layers:
            raise UserError(
                f"--layer {self._layer} is not among the {layers} layers in {path}.\n"
                "Leave it out to take each file's last one."
            )
        return EngineFile(path, len(ids), layers), ids

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors: {reason(error)}.\n"
                "Let the engine write it again, or take it away."
            ) from error


def _key(ids: Tensor) -> int:
    return xxhash.xxh3_128_intdigest(ids.numpy().tobytes())
