"""Which ids of two tokenizers stand for the same: on these a student and its teacher can be compared."""

import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cache

import numpy as np
from litgpt.tokenizer import Tokenizer

from litgpt_akl.messages import UserError
from litgpt_akl.models.tokenizer import token_map

NONE = -1
"""In place of an id that the other tokenizer lacks."""
SPACE = "▁"
"""What stands for a space in the tokens of SentencePiece's kind."""
BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


@cache
def byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones of Latin-1 are themselves (GPT-2)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """What each id adds to a text, in UTF-8; of special tokens, their names.

    Raises:
        UserError: the tokenizer is of a kind whose tokens are no parts of a text, such as WordPiece's.
    """
    tokens, write = token_map(tokenizer), _spaced
    names: dict[int, str] = {}
    if tokenizer.backend == "huggingface":
        names = {id: token.content for id, token in tokenizer.processor.get_added_tokens_decoder().items()}
        parts = json.loads(tokenizer.processor.to_str())
        kinds = {name: json.dumps(parts.get(name), ensure_ascii=False) for name in ("pre_tokenizer", "decoder")}
        if '"ByteLevel"' in kinds["pre_tokenizer"]:
            write = _byte_level
        elif SPACE not in kinds["decoder"]:
            raise UserError(
                f"The tokenizer of {parts['model']['type']} whose decoder is {kinds['decoder'][:80]} is neither of"
                " byte-level BPE's nor of SentencePiece's kind, so it is not known which bytes its tokens are.\n"
                "Choose a teacher and a student of these kinds, or models of one tokenizer."
            )
    else:
        names = {id: token for id, token in tokens.items() if tokenizer.processor.is_control(id)}
    return {id: names[id].encode() if id in names else write(token) for id, token in tokens.items()}


def _byte_level(token: str) -> bytes:
    letters = byte_letters()
    # some vocabularies have tokens that were added as common text
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else token.encode()


def _spaced(token: str) -> bytes:
    return BYTE_TOKENS.get(token) or token.replace(SPACE, " ").encode()


def partners(student: Tokenizer, teacher: Tokenizer, ends: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """The teacher's id that stands for the same as each id of the student, ``[ids]``, or :data:`NONE`.

    Tokens of text stand for the same if their bytes are equal, special tokens if their names are, and the tokens that
    end a response for both do so whatever their names are: ``ends`` are pairs of a student's id and a teacher's. No id
    has two partners: of several with equal bytes the first has the first, where plain tokens come before those that
    stand for single bytes, and these before added ones. So each id of equal tokenizers is its own partner.

    Raises:
        UserError: one of the tokenizers has tokens that are no parts of a text.
    """
    own, others = (_by_meaning(tokenizer) for tokenizer in (student, teacher))
    pairs = [pair for meaning, ids in own.items() for pair in zip(ids, others.get(meaning, ()), strict=False)]
    found = np.full(max(max(ids) for ids in own.values()) + 1, NONE, dtype=np.int64)
    for id, other in pairs:
        found[id] = other
    taken: set[int] = set()
    for id, other in ends:
        if id in taken or other in found[list(taken)]:
            continue
        found[found == other] = NONE
        found[id] = other
        taken.add(id)
    known = [token_map(tokenizer).keys() for tokenizer in (student, teacher)]
    if known[0] == known[1] and all(found[id] == id for id in known[0]):
        # numbers without a token between those with one mean as little to one as to the other
        return np.arange(len(found))
    return found


def _by_meaning(tokenizer: Tokenizer) -> dict[tuple[bool, bytes], list[int]]:
    """Ids by whether they are special and by their bytes, the first choice first."""
    tokens, special = token_map(tokenizer), tokenizer.special_ids
    added: set[int] = set()
    if tokenizer.backend == "huggingface":
        added = set(tokenizer.processor.get_added_tokens_decoder())
    found: dict[tuple[bool, bytes], list[int]] = defaultdict(list)
    known = token_bytes(tokenizer)
    for id in sorted(known, key=lambda id: (id in added, tokens[id] in BYTE_TOKENS, id)):
        found[id in special, known[id]].append(id)
    return found
