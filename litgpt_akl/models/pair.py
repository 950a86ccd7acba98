"""Do teacher and student fit? Asked before any weight is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from litgpt.config import Config, configs
from litgpt.tokenizer import Tokenizer
from litgpt.utils import extend_checkpoint_dir

from litgpt_akl.files.changed_files import WAY_OUT, Stamp, check_unchanged, stamp_of
from litgpt_akl.messages import UserError
from litgpt_akl.models.chat_template import named_templates
from litgpt_akl.models.model_files import ModelFiles, read_model_files, read_tokenizer
from litgpt_akl.models.tokenizer import token_map
from litgpt_akl.models.weights import OPTIONS, find_checkpoint_dir, is_said_to_be_tied, model_paths, read_config


@dataclass
class Pair:
    """A student and a teacher that can be compared token by token."""

    student_dir: Path
    teacher_dir: Path
    student_config: Config
    teacher_config: Config
    tokenizer: Tokenizer
    """The student's; the teacher's differs in added tokens at most."""
    vocab_size: int
    """Ids that both tokenizers and both heads have; ids from here on are padding, or known to one model alone."""
    student_files: ModelFiles
    """What a trained student is written with."""
    stamps: dict[str, list[Stamp]]
    """Of all files of both models, by role, from before any was read."""
    notes: tuple[str, ...] = ()
    """What the two differ in that is no fault, to be said once."""
    teacher_tokenizer: Tokenizer | None = None
    """The teacher's own, if it need not be the student's; ``vocab_size`` are then the student's ids alone."""
    teacher_vocab_size: int | None = None
    """Ids that the teacher has, in that case."""
    others: tuple["Pair", ...] = ()
    """The same student with each teacher after the first, if there are several."""

    @property
    def directories(self) -> dict[str, Path]:
        """By role."""
        return {"student": self.student_dir, "teacher": self.teacher_dir}

    @property
    def all_directories(self) -> dict[str, Path]:
        """By role, of all teachers if there are several."""
        others = {f"teacher {number}": pair.teacher_dir for number, pair in enumerate(self.others, start=2)}
        return self.directories | others

    @property
    def is_one_model(self) -> bool:
        """Whether student and teacher are one directory."""
        return self.student_dir.samefile(self.teacher_dir)

    @property
    def of_each(self) -> tuple["Pair", ...]:
        """The student with each teacher alone."""
        return replace(self, others=()), *self.others

    @property
    def context_length(self) -> int:
        """The student's tokens that all models can read, of which a teacher with its own tokenizer reads none."""
        if self.teacher_tokenizer is not None:
            return self.student_config.block_size
        return min(self.student_config.block_size, *(pair.teacher_config.block_size for pair in self.of_each))

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
    student_dir: Path,
    teacher_dir: Path,
    access_token: str | None = None,
    teacher_weights_needed: bool = True,
    student_option: str | None = None,
    other_tokenizer: bool = False,
    way_out: str = "",
) -> Pair:
    """Read both models' configurations and tokenizers and see that they fit.

    ``student_option`` is what a message calls the option that gave the student, if that is not ``checkpoint_dir``. With
    ``other_tokenizer`` they need not have one tokenizer; ``way_out`` is what else can be done where they have not.

    Raises:
        UserError: a directory that is no checkpoint, tokenizers that differ, a head narrower than the tokenizer. The
            message names both sides and the way out.
    """
    student_dir = find_checkpoint_dir(student_dir, "student", access_token, option=student_option)
    teacher_dir = find_checkpoint_dir(teacher_dir, "teacher", access_token, teacher_weights_needed)
    directories = {"student": student_dir, "teacher": teacher_dir}
    stamps = {role: [*map(stamp_of, model_paths(directory))] for role, directory in directories.items()}
    student_files = read_model_files(student_dir)
    configs = {"student": read_config(student_dir), "teacher": read_config(teacher_dir)}
    tokenizer, teacher_tokenizer = read_tokenizer(student_dir), read_tokenizer(teacher_dir)
    tokenizers, notes = {"student": tokenizer, "teacher": teacher_tokenizer}, []
    if other_tokenizer:
        sizes = {role: _count_own(role, reader, configs[role]) for role, reader in tokenizers.items()}
    else:
        vocab_size, notes = _compare_tokens(tokenizers, directories, configs, way_out)
        sizes = dict.fromkeys(tokenizers, vocab_size)
    for role, reader in tokenizers.items():
        if not isinstance(reader.eos_id, int) or not 0 <= reader.eos_id < sizes[role]:
            raise UserError(
                f"The {role}'s end-of-text id is {reader.eos_id}; its tokenizer has the ids 0 to {sizes[role] - 1}.\n"
                "Set eos_token in its tokenizer_config.json to a token of the tokenizer."
            )
    known = *directories.values(), *configs.values(), tokenizer, sizes["student"], student_files, stamps
    if other_tokenizer:
        return Pair(*known, teacher_tokenizer=teacher_tokenizer, teacher_vocab_size=sizes["teacher"])
    return Pair(*known, (*notes, *_compare_ends(tokenizer, teacher_tokenizer, directories)))


def _count_own(role: str, tokenizer: Tokenizer, config: Config) -> int:
    """How many ids a model has that is compared with no other one; raises UserError if its head lacks one of text."""
    tokens, rows = token_map(tokenizer), config.padded_vocab_size
    if any(id >= rows for id in tokens.keys() - _added_ids(tokenizer)):
        raise _narrow_head(role, config, tokens)
    return min(1 + max(tokens), rows)


def _narrow_head(role: str, config: Config, tokens: dict[int, str]) -> UserError:
    return UserError(
        f"The {role}'s LM head has {config.padded_vocab_size:,} ids, but its tokenizer has {len(tokens):,}"
        f" ({tokens[max(tokens)]!r} is the last).\nUse the tokenizer it was trained with."
    )


def _added_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of tokens that no text is divided into by itself, such as marks between turns."""
    if tokenizer.backend == "huggingface":
        return set(tokenizer.processor.get_added_tokens_decoder())
    return {id for id in range(tokenizer.processor.vocab_size()) if tokenizer.processor.is_control(id)}


def _compare_tokens(
    tokenizers: dict[str, Tokenizer], directories: dict[str, Path], configs: dict[str, Config], way_out: str
) -> tuple[int, list[str]]:
    """How many ids both models have, and how their added tokens differ, by which models of one family may.

    Raises:
        UserError: the tokenizers divide texts otherwise, or a head has no row for a token of text.
    """
    maps = {role: token_map(tokenizer) for role, tokenizer in tokenizers.items()}
    added = {role: _added_ids(tokenizer) for role, tokenizer in tokenizers.items()}
    student, teacher = maps.values()
    differing = sorted(id for id in student.keys() | teacher.keys() if student.get(id) != teacher.get(id))
    told = [
        f"id {id} is {student.get(id)!r} for the student and {teacher.get(id)!r} for the teacher" for id in differing
    ]
    if any(id in maps[role] and id not in added[role] for id in differing for role in maps):
        raise UserError(
            f"The tokenizers differ in {len(differing):,} ids: {told[0]} ({directories['student']} has"
            f" {len(student):,} ids, {directories['teacher']} {len(teacher):,}).\n"
            f"Choose models of one family: their next-token distributions are over the same ids then.{way_out}"
        )
    vocab_size = 1 + min(max(student), max(teacher))
    notes = []
    if differing:
        notes.append(f"The tokenizers differ in {len(differing):,} added tokens: {'; '.join(told[:3])}.")
    for role, config in configs.items():
        beyond = [id for id in range(config.padded_vocab_size, vocab_size) if id in maps[role]]
        if any(id not in added[role] for id in beyond):
            raise _narrow_head(role, config, maps[role])
        if beyond:
            notes.append(f"The {role} has no embedding of {maps[role][beyond[0]]!r}, id {beyond[0]}.")
    common = min(vocab_size, *(config.padded_vocab_size for config in configs.values()))
    if common < max(map(len, maps.values())):
        notes.append(f"Ids from {common:,} on, which only one of the models knows, are not distilled.")
    return common, notes


def _compare_ends(student: Tokenizer, teacher: Tokenizer, directories: dict[str, Path]) -> list[str]:
    """Base models and those trained for chats end texts otherwise, and the latter have a template."""
    notes = []
    if student.eos_id != teacher.eos_id:
        names = {role: token_map(of).get(of.eos_id) for role, of in (("student", student), ("teacher", teacher))}
        notes.append(
            f"The student ends texts with {names['student']!r}, the teacher with {names['teacher']!r}: the labels end"
            " in the student's, which the teacher may never write. Give both the same eos_token, if that is not meant."
        )
    templates = {role: named_templates(directory) for role, directory in directories.items()}
    sources = {role: [source for _, source in found.values()] for role, found in templates.items()}
    if sources["teacher"] and sources["student"] != sources["teacher"]:
        lacks = "has another chat template than" if sources["student"] else "has no chat template, unlike"
        notes.append(
            f"The student {lacks} the teacher, which is asked in the student's form. As the data's chat_template,"
            " `teacher` takes the teacher's for both."
        )
    return notes


class Models(NamedTuple):
    """What is known of a pair without weights."""

    student: Config
    teacher: Config
    vocab_size: int
    """Ids that both heads have, and if the pair was checked, the tokenizer; of two tokenizers the larger one's."""
    student_tied: bool
    """Whether embeddings and LM head are said to be one matrix."""
    teacher_tied: bool
    is_one: bool
    """Whether student and teacher are the same."""
    others: tuple["Models", ...] = ()
    """The same student with each teacher after the first, if there are several."""

    @property
    def context_length(self) -> int:
        """Tokens that all models can read."""
        return min(models.block_size for models in (self.student, self.teacher, *(of.teacher for of in self.others)))


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
    vocab_size = min(config.padded_vocab_size for config in found.values())
    if pair is not None:
        vocab_size = max(pair.vocab_size, pair.teacher_vocab_size or 0)
    return Models(
        **found,
        vocab_size=vocab_size,
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
        f"The {role} {path} is neither a LitGPT checkpoint directory nor a model that LitGPT knows.\nGive"
        f" {OPTIONS[role]} one of `litgpt download list`, such as Llama-3.1-8B or meta-llama/Llama-3.1-8B."
    )
