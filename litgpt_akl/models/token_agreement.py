"""Several files describe one tokenizer and how it is asked: what two of them say must be the same."""

from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any

from litgpt.tokenizer import Tokenizer

from litgpt_akl.files.reading import explain_damage, read_json
from litgpt_akl.messages import UserError
from litgpt_akl.models.chat_template import default_templates
from litgpt_akl.models.tokenizer import as_list, read_generation_config, token_map

WAY_OUT = "Correct the one that is wrong, or take the files from the model's publisher again."


def check_one_template(checkpoint_dir: Path) -> None:
    """See that all files with a default chat template have the same one: readers differ in which they take.

    Raises:
        UserError: two are different, or one cannot be read.
    """
    found = [(path, source.rstrip()) for path, source in default_templates(checkpoint_dir)]
    for path, source in found[1:]:
        if source != found[0][1]:
            raise UserError(
                f"{found[0][0]} and {path.name} have different chat templates: {_difference(found[0][1], source)}.\n"
                "Remove the template that is wrong: some readers take one, some the other."
            )


def _difference(one: str, other: str) -> str:
    """Where two texts begin to differ, as it is in each."""
    begin = len(commonprefix((one, other)))
    return f"{one[begin : begin + 30]!r} and {other[begin : begin + 30]!r}"


def check_tokens(checkpoint_dir: Path, tokenizer: Tokenizer) -> None:
    """See that tokens and ids which other files name are the tokenizer's.

    Raises:
        UserError: one is not; the message has both values.
    """
    tokens = token_map(tokenizer)
    for name, ids in _named_ends(checkpoint_dir):
        for id in ids:
            if isinstance(id, bool) or not isinstance(id, int) or id not in tokens:
                raise UserError(
                    f"{checkpoint_dir / name} has the eos_token_id {id!r}, and the tokenizer's ids are"
                    f" {min(tokens)} to {max(tokens)}.\n{WAY_OUT}"
                )
    if tokenizer.backend != "huggingface":
        return
    numbers = {token: id for id, token in tokens.items()}
    for name, token, id in _named_tokens(checkpoint_dir):
        known = id in tokens or token in numbers
        if known and (tokens.get(id) != token or numbers.get(token) != id):
            theirs = f"{tokens[id]!r}, id {id}" if id in tokens else f"{token!r}, id {numbers[token]}"
            raise UserError(
                f"{checkpoint_dir / name} says that id {id} is {token!r}, and tokenizer.json has {theirs}.\n{WAY_OUT}"
            )
    _check_special_tokens(checkpoint_dir)


def _named_ends(checkpoint_dir: Path) -> Iterator[tuple[str, list[Any]]]:
    with explain_damage(checkpoint_dir / "generation_config.json", "JSON"):
        yield "generation_config.json", as_list(read_generation_config(checkpoint_dir).get("eos_token_id"))
    if (path := checkpoint_dir / "config.json").is_file():
        yield path.name, as_list(read_json(path).get("eos_token_id"))


def _named_tokens(checkpoint_dir: Path) -> Iterator[tuple[str, str, int]]:
    """Tokens and their ids, as files beside tokenizer.json have them."""
    if (path := checkpoint_dir / "tokenizer_config.json").is_file():
        with explain_damage(path, "a file that names tokens"):
            for id, entry in (read_json(path).get("added_tokens_decoder") or {}).items():
                # an id without its token says that there is one, and no more
                if "content" in entry:
                    yield path.name, entry["content"], int(id)
    if (path := checkpoint_dir / "added_tokens.json").is_file():
        with explain_damage(path, "a file that names tokens"):
            for token, id in read_json(path).items():
                yield path.name, token, int(id)


def _check_special_tokens(checkpoint_dir: Path) -> None:
    """LitGPT reads which tokens are BOS and EOS from one file, and Transformers from two."""
    first, second = (checkpoint_dir / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    if not first.is_file() or not second.is_file():
        return
    config, others = read_json(first), read_json(second)
    if "added_tokens_decoder" in config:
        # then Transformers asks this file alone
        return
    for name in ("bos_token", "eos_token"):
        one, other = (_content(entries.get(name)) for entries in (config, others))
        if None not in (one, other) and one != other:
            raise UserError(f"{second} has the {name} {other!r}, and {first.name} has {one!r}.\n{WAY_OUT}")


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry
