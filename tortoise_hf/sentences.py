"""Long texts in pieces that TorToiSe speaks well: whole sentences, about 200 characters, never inside a quotation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

DESIRED_CHARACTERS = 200
"""Sentences are joined up to about here. Source: tortoise-tts's splitter, as is the limit."""
MAX_CHARACTERS = 300
"""No piece is longer."""

_ABBREVIATIONS = frozenset(
    [
        *("mr", "mrs", "ms", "dr", "st", "co", "jr", "sr", "maj", "gen", "drs", "rev", "lt", "hon", "sgt", "capt"),
        *("esq", "ltd", "col", "ft", "prof", "vs", "etc", "e.g", "i.e"),
    ]
)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
_CLAUSE_END = re.compile(r"(?:[,;:][\"'”’)\]]*|\s[-–—]+|—)(?=\s|$)")
_WORD_END = re.compile(r"(?=\s)")


@dataclass(frozen=True)
class Piece:
    """What is spoken in one go."""

    text: str
    ends_paragraph: bool
    """Whether a paragraph, or the whole text, ends with it."""


def split_text(
    text: str,
    fits: Callable[[str], bool] = lambda piece: True,
    desired: int = DESIRED_CHARACTERS,
    limit: int = MAX_CHARACTERS,
) -> list[Piece]:
    """Cut a text into pieces.

    Sentences stay whole and quotations together where the limit allows it. A sentence that is too long is cut at commas
    and dashes, a quotation that is too long between its sentences, else between words; a word only if it alone is too
    long. Pieces in their order hold all characters of the text but whitespace.

    Args:
        text: any text; an empty line ends a paragraph, other line ends are spaces.
        fits: whether a piece has few enough tokens.
        desired: characters up to which sentences are joined.
        limit: characters a piece has at most.

    Returns: the pieces; none for a text of nothing but whitespace.
    """
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if not paragraph:
            continue

        def ok(piece: str) -> bool:
            return len(piece) <= limit and fits(piece)

        units = [unit for sentence in _cut(paragraph, _SENTENCE_END) for unit in _shorten(sentence, ok)]
        packed = list(_pack(units, ok, desired))
        pieces += [Piece(piece, index == len(packed) - 1) for index, piece in enumerate(packed)]
    return pieces


def _shorten(sentence: str, ok: Callable[[str], bool]) -> Iterator[str]:
    """A sentence in as few cuts as it takes, the gentlest kind first."""
    if ok(sentence):
        yield sentence
        return
    for boundary, quotes_hold in (
        (_CLAUSE_END, True),
        (_SENTENCE_END, False),
        (_CLAUSE_END, False),
        (_WORD_END, False),
    ):
        parts = list(_cut(sentence, boundary, quotes_hold))
        if len(parts) > 1:
            # Not up to `desired`: the fewer cuts inside a sentence, the better.
            yield from _pack([unit for part in parts for unit in _shorten(part, ok)], ok, 10**9)
            return
    middle = len(sentence) // 2
    for half in (sentence[:middle], sentence[middle:]) if middle else ():
        yield from _shorten(half, ok)


def _pack(units: Iterable[str], ok: Callable[[str], bool], desired: int) -> Iterator[str]:
    """Join neighbours while they fit and are short of the desired length."""
    piece = ""
    for unit in units:
        joined = f"{piece} {unit}" if piece else unit
        if piece and (len(piece) >= desired or not ok(joined)):
            yield piece
            piece = unit
        else:
            piece = joined
    if piece:
        yield piece


def _cut(text: str, boundary: re.Pattern[str], quotes_hold: bool = True) -> Iterator[str]:
    """Cut behind every match of the boundary that isn't inside a quotation."""
    inside = _quoted(text) if quotes_hold else None
    start = 0
    for match in boundary.finditer(text):
        end = match.end()
        if inside is not None and end < len(text) and inside[end]:
            continue
        if boundary is _SENTENCE_END and not _ends_sentence(text, match):
            continue
        if text[start:end].strip():
            yield text[start:end].strip()
            start = end
    if text[start:].strip():
        yield text[start:].strip()


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Not behind "Dr." or an initial, and not before a word in lower case."""
    following = text[match.end() :].lstrip()[:1]
    if not match[0].startswith(".") or match[0].startswith(".."):
        return not following.islower()
    word = re.split(r"[\s(\[\"'“‘]", text[: match.start()])[-1]
    initial = len(word) == 1 and word.isupper() and word != "I"
    return not (initial or word.lower() in _ABBREVIATIONS or following.islower())


def _quoted(text: str) -> list[bool]:
    """For each character whether it is inside double quotation marks; marks without a partner don't count."""
    inside, opened = [False] * len(text), -1
    for index, character in enumerate(text):
        if opened < 0 and character in '"“':
            opened = index
        elif opened >= 0 and character in '"”':
            inside[opened + 1 : index + 1] = [True] * (index - opened)
            opened = -1
    return inside
