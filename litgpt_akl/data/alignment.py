"""The same text in the tokens of two tokenizers: where both end at the same byte, and what lies between."""

from collections.abc import Sequence
from itertools import accumulate

Chunk = tuple[int, int]
"""How many tokens of the student, and how many of the teacher, have the same bytes; 0 where one has no token for it."""


def align(student_spans: Sequence[bytes], teacher_spans: Sequence[bytes]) -> list[Chunk]:
    """Cut one text into the shortest chunks that begin and end between tokens of both.

    Each token is in exactly one chunk, in order, and the bytes of both sides of a chunk are equal. A token without
    bytes goes with the token that follows it, or with the last chunk.

    Args:
        student_spans: the bytes of each of the student's tokens.
        teacher_spans: those of the teacher's; joined, both are the same text.

    Raises:
        ValueError: the texts differ.
    """
    if b"".join(student_spans) != b"".join(teacher_spans):
        raise ValueError("the tokens are not of one text")
    own, others = (list(accumulate(map(len, spans))) for spans in (student_spans, teacher_spans))
    chunks, first, other_first, at, other_at = [], 0, 0, 1, 1
    while at <= len(own) and other_at <= len(others):
        difference = own[at - 1] - others[other_at - 1]
        if difference == 0:
            chunks.append((at - first, other_at - other_first))
            first, other_first, at, other_at = at, other_at, at + 1, other_at + 1
        elif difference < 0:
            at += 1
        else:
            other_at += 1
    left = len(own) - first, len(others) - other_first
    if any(left):
        # these have no bytes
        if chunks:
            left = left[0] + chunks[-1][0], left[1] + chunks[-1][1]
        chunks[-1:] = [left]
    return chunks


def align_response(
    student_spans: Sequence[bytes], teacher_spans: Sequence[bytes], student_ends: bool, teacher_ends: bool
) -> list[Chunk]:
    """The chunks of a response and of the token that ends it, which are one whatever its name is for each model.

    White space at the edges, of which one of the chat templates writes more, counts as no text.

    Args:
        student_spans: the bytes of each of the student's tokens, that which ends the response last.
        teacher_spans: those of the teacher's.
        student_ends: whether the student's last token ends the response; its bytes are then no text.
        teacher_ends: whether the teacher's does.

    Raises:
        ValueError: the response is another text for the teacher.
    """
    own = list(student_spans[:-1] if student_ends else student_spans)
    others = list(teacher_spans[:-1] if teacher_ends else teacher_spans)
    if b"".join(own) != b"".join(others):
        own, others = _without_edges(own, others)
    chunks = align(own, others)
    if student_ends or teacher_ends:
        chunks.append((int(student_ends), int(teacher_ends)))
    return chunks


def _without_edges(own: list[bytes], others: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The bytes of both sides without the white space at the edges that only one of them has."""
    texts = [b"".join(own), b"".join(others)]
    before = [len(text) - len(text.lstrip()) for text in texts]
    # all of a text of nothing but white space stands at its begin
    after = [len(text) - len(text.rstrip() or text) for text in texts]
    pieces = zip((own, others), texts, before, after, strict=True)
    found = [_cut(spans, b - min(before), len(text) - (a - min(after))) for spans, text, b, a in pieces]
    if b"".join(found[0]) != b"".join(found[1]):
        raise ValueError(_describe_difference(*texts))
    return found[0], found[1]


def _cut(spans: list[bytes], begin: int, end: int) -> list[bytes]:
    """The bytes of each token that lie in a range of the text; a token may have none left."""
    starts = accumulate(map(len, spans[:-1]), initial=0)
    return [span[max(begin - start, 0) : max(end - start, 0)] for span, start in zip(spans, starts, strict=bool(spans))]


def _describe_difference(own: bytes, other: bytes) -> str:
    at = next((at for at, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    shown = [text[max(0, at - 10) : at + 20].decode(errors="replace") for text in (own, other)]
    return f"its response reads {shown[0]!r} in the student's tokens and {shown[1]!r} in the teacher's"
