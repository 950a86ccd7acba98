"""Do teacher and student fit? Asked before any weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from litgpt.config import Config, configs
from litgpt.tokenizer import Tokenizer
from litgpt.utils import extend_checkpoint_dir

from litgpt_akl.files.changed_files import WAY_OUT, Stamp, check_unchanged, stamp_of
from litgpt_akl.messages import UserError
from litgpt_akl.models.model_files import ModelFiles, read_model_files, read_tokenizer
from litgpt_akl.models.weights import find_checkpoint_dir, is_said_to_be_tied, model_paths, read_config


@dataclass
class Pair:
    """A student and a teacher that can be compared token by token."""

    student_dir: Path
    teacher_dir: Path
    student_config: Config
    teacher_config: Config
    tokenizer: Tokenizer
    """The student's; the teacher's has the same id -> token map."""
    vocab_size: int
    """Ids that the tokenizer and both heads have; ids from here on are padding."""
    student_files: ModelFiles
    """What a trained student is written with."""
    stamps: dict[str, list[Stamp]]
    """Of all files of both models, by role, from before any was read."""

    @property
    def directories(self) -> dict[str, Path]:
        """By role."""
        return {"student": self.student_dir, "teacher": self.teacher_dir}

    @property
    def is_one_model(self) -> bool:
        """Whether student and teacher are one directory."""
        return self.student_dir.samefile(self.teacher_dir)

    @property
    def context_length(self) -> int:
        """Tokens that both models can read."""
        return min(self.student_config.block_size, self.teacher_config.block_size)

    def check_unchanged(self, role: str) -> None:
        """See that a model's files are those that were there when the first of them was read.

        Raises:
            UserError: one was changed, replaced or removed, or another one has come.
        """
        check_unchanged(self.stamps[role])
        known = {stamp.path for stamp in self.stamps[role]}
        others = [path for path in model_paths(self.directories[role]) if path not in known]
        if others:
            raise UserError(
                f"{others[0]} was added while this command was reading {self.directories[role]}.\n{WAY_OUT}"
            )


def check_pair(
    student_dir: Path, teacher_dir: Path, access_token: str | None = None, teacher_weights_needed: bool = True
) -> Pair:
    """Read both models' configurations and tokenizers and see that they fit.

    Raises:
        UserError: a directory that is no checkpoint, tokenizers that differ, a head narrower than the tokenizer. The
            message names both sides and the way out.
    """
    student_dir = find_checkpoint_dir(student_dir, "student", access_token)
    teacher_dir = find_checkpoint_dir(teacher_dir, "teacher", access_token, teacher_weights_needed)
    directories = {"student": student_dir, "teacher": teacher_dir}
    stamps = {role: [*map(stamp_of, model_paths(directory))] for role, directory in directories.items()}
    student_files = read_model_files(student_dir)
    configs = {"student": read_config(student_dir), "teacher": read_config(teacher_dir)}
    tokenizer, teacher_tokenizer = read_tokenizer(student_dir), read_tokenizer(teacher_dir)
    tokens = token_map(tokenizer)
    _check_same_tokens(tokens, token_map(teacher_tokenizer), student_dir, teacher_dir)
    vocab_size = max(tokens) + 1
    for role, config in configs.items():
        if config.padded_vocab_size < vocab_size:
            raise UserError(
                f"The {role}'s LM head has {config.padded_vocab_size:,} ids, but its tokenizer has"
                f" {vocab_size:,} ({tokens[vocab_size - 1]!r} is the last).\nUse the tokenizer it was trained with."
            )
    for role, reader in (("student", tokenizer), ("teacher", teacher_tokenizer)):
        if not isinstance(reader.eos_id, int) or not 0 <= reader.eos_id < vocab_size:
            raise UserError(
                f"The {role}'s end-of-text id is {reader.eos_id}; its tokenizer has the ids 0 to {vocab_size - 1}.\n"
                "Set eos_token in its tokenizer_config.json to a token of the tokenizer."
            )
    return Pair(*directories.values(), *configs.values(), tokenizer, vocab_size, student_files, stamps)


def token_map(tokenizer: Tokenizer) -> dict[int, str]:
    """Token by id, special and added tokens included."""
    processor = tokenizer.processor
    if tokenizer.backend == "huggingface":
        return {id: token for token, id in processor.get_vocab(with_added_tokens=True).items()}
    return {id: processor.id_to_piece(id) for id in range(processor.vocab_size())}


def _check_same_tokens(student: dict[int, str], teacher: dict[int, str], student_dir: Path, teacher_dir: Path) -> None:
    if student == teacher:
        return
    differing = sorted(id for id in student.keys() | teacher.keys() if student.get(id) != teacher.get(id))
    first = differing[0]
    raise UserError(
        f"The tokenizers differ in {len(differing):,} ids: id {first} is {student.get(first)!r} in {student_dir}"
        f" ({len(student):,} ids) and {teacher.get(first)!r} in {teacher_dir} ({len(teacher):,} ids).\n"
        "Choose models of one family: their next-token distributions are over the same ids then."
    )


class Models(NamedTuple):
    """What is known of a pair without weights."""

    student: Config
    teacher: Config
    vocab_size: int
    """Ids that both heads have, and if the pair was checked, the tokenizer."""
    student_tied: bool
    """Whether embeddings and LM head are said to be one matrix."""
    teacher_tied: bool
    is_one: bool
    """Whether student and teacher are the same."""


def find_models(checkpoint_dir: Path, teacher_checkpoint_dir: Path, pair: Pair | None = None) -> Models:
    """What can be known of two models that may be there or not; nothing is downloaded.

    Each is a checkpoint directory, or a name or model id that LitGPT knows; ``pair`` are the two, if they were checked.

    Raises:
        UserError: neither a directory nor a name; or two directories whose models do not fit.
    """
    if pair is None:
        paths = {"student": Path(checkpoint_dir), "teacher": Path(teacher_checkpoint_dir)}
        directories = {role: extend_checkpoint_dir(path) for role, path in paths.items()}
        found = {role: _find_config(path, directories[role], role) for role, path in paths.items()}
        if all(directory.is_dir() for directory in directories.values()):
            pair = check_pair(*directories.values())
    if pair is not None:
        directories, found = pair.directories, {"student": pair.student_config, "teacher": pair.teacher_config}
    return Models(
        **found,
        vocab_size=pair.vocab_size if pair else min(config.padded_vocab_size for config in found.values()),
        student_tied=is_said_to_be_tied(directories["student"]) is True,
        teacher_tied=is_said_to_be_tied(directories["teacher"]) is True,
        is_one=pair.is_one_model if pair else directories["student"] == directories["teacher"],
    )


def _find_config(path: Path, directory: Path, role: str) -> Config:
    """Of a checkpoint, else of a name such as ``Llama-3.1-8B`` or a model id such as ``meta-llama/Llama-3.1-8B``."""
    if (directory / "model_config.yaml").is_file():
        return read_config(directory)
    names = {name for config in configs for name in (config["name"], config["hf_config"]["name"])}
    places = {".", *(config["hf_config"]["org"] for config in configs)}
    if path.name in names and str(path.parent) in places:
        return Config.from_name(path.name)
    raise UserError(
        f"The {role} {path} is neither a LitGPT checkpoint directory nor a model that LitGPT knows. Give one of"
        " `litgpt download list`, such as Llama-3.1-8B or meta-llama/Llama-3.1-8B."
    )
