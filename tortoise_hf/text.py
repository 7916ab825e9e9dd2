"""Text in, text ids out: the cleaners and the byte-pair tokenizer that TorToiSe's weights were trained with.

A GPT that was trained on one spelling of the world must be fed that same spelling, so nothing here is a matter of
taste: numbers become words with `inflect`, foreign letters become ASCII with `unidecode`, and a handful of
abbreviations is written out, oddities included.

Which cleaner goes where: **training** uses `clean_training_text` (brackets become parentheses, a backtick an
apostrophe), because the weights were trained on text cleaned that way and a row with a bracket would otherwise hold
characters nobody knows. **Speaking** uses `clean_text`, character for character what the published inference programs
feed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from unidecode import unidecode

from tortoise_hf.errors import UserError

STOP_ID, UNK_ID, SPACE_ID = 0, 1, 2
SPECIAL_TOKENS = ("[STOP]", "[UNK]", "[SPACE]")
"""The first three ids of every TorToiSe tokenizer. Source: the released tokenizer.json."""

CHARACTERS = "!'(),-./:;?abcdefghijklmnopqrstuvwxyz"
"""All that a cleaned text may hold besides the space, in id order (3 to 39). Source: the released tokenizer.json."""

# In the order they are tried. "misess" is how the weights know it. Source: TorToiSe's English cleaner.
_ABBREVIATIONS = [
    (re.compile(rf"\b{short}\."), full)
    for short, full in {
        "mrs": "misess",
        "mr": "mister",
        "dr": "doctor",
        "st": "saint",
        "co": "company",
        "jr": "junior",
        "maj": "major",
        "gen": "general",
        "drs": "doctors",
        "rev": "reverend",
        "lt": "lieutenant",
        "hon": "honorable",
        "sgt": "sergeant",
        "capt": "captain",
        "esq": "esquire",
        "ltd": "limited",
        "col": "colonel",
        "ft": "fort",
    }.items()
]
_COMMAS_IN_NUMBER = re.compile(r"(?<=[0-9]),+(?=[0-9])")
_DOLLARS = re.compile(r"\$([0-9.,]*[0-9])")
# The look-behinds change no match; they keep a long run of digits from being tried from each of its digits.
_DECIMAL = re.compile(r"(?<![0-9])([0-9]+)\.([0-9]+)")
_ORDINAL = re.compile(r"(?<![0-9])([0-9]+)(st|nd|rd|th)")
_INTEGER = re.compile(r"[0-9]+")
_WHITESPACE = re.compile(r"\s+")
_BRACKETS_AND_QUOTES = str.maketrans("{[}]`", "(())'")
_LONE_SYMBOL = re.compile(r"[@#%_=$^&*+\\]")
_INFLECT_DIGITS = 36
"""Longest integer inflect has words for, in digits (decillions)."""
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def clean_text(text: str) -> str:
    """Spell a text the way TorToiSe's inference programs do.

    Transliterate to ASCII, lowercase, read numbers, write out abbreviations, collapse whitespace to single spaces
    (leading and trailing ones stay), drop double quotes. The currency sign of pounds and euros is transliterated
    before numbers are read ("£5" -> "psfive"). Numbers of more than 36 digits, for which there are no words, are read
    digit by digit; the original raises an error there. Everything else is exactly the original's.

    Args:
        text: any text; unidecode decides what other scripts become.

    Returns:
        Lower-case ASCII. Characters outside `CHARACTERS` (such as "&" or "%") stay, unknown to the tokenizer.
    """
    text = unidecode(text).lower()
    if _INTEGER.search(text):
        text = _read_numbers(text)
    if "." in text:
        # One at a time: a replacement can join the next abbreviation and keep it from being one ("st.co.").
        for pattern, full in _ABBREVIATIONS:
            text = pattern.sub(full, text)
    return _WHITESPACE.sub(" ", text).replace('"', "")


def clean_training_text(text: str) -> str:
    r"""Spell a text the way TorToiSe's GPT saw it in training: `clean_text`, then one more step.

    Square and curly brackets become parentheses, a backtick becomes an apostrophe, and a text that is nothing but one
    of `@ # % _ = $ ^ & * + \` becomes empty. Source: the GPT tokenizer of DL-Art-School, the weights' own trainer.

    Args:
        text: any text.

    Returns:
        Lower-case ASCII; may still hold characters the tokenizer does not know, see `TextTokenizer.unknown_characters`.
    """
    text = clean_text(text).translate(_BRACKETS_AND_QUOTES)
    return "" if _LONE_SYMBOL.fullmatch(text) else text


def _read_numbers(text: str) -> str:
    """Write every number of an ASCII, lower-case text in words. The order of the rules is part of the format."""
    text = _COMMAS_IN_NUMBER.sub("", text)
    text = _DOLLARS.sub(_read_dollars, text)
    text = _DECIMAL.sub(r"\1 point \2", text)
    text = _ORDINAL.sub(lambda match: _ordinal_words(match[1], match[2]), text)
    return _INTEGER.sub(lambda match: _integer_words(match[0]), text)


def _read_dollars(match: re.Match[str]) -> str:
    """Amount in digits -> digits with units ("3 dollars, 50 cents"); the digits are read by the rules that follow."""
    parts = match[1].split(".")
    if len(parts) > 2:
        return f"{match[1]} dollars"
    # Strings, not integers: Python refuses to convert very long ones. A comma is left when no digit stood beside it.
    dollars, cents = (part.replace(",", "").lstrip("0") for part in (*parts, "")[:2])
    spoken_dollars = f"{dollars} {'dollar' if dollars == '1' else 'dollars'}"
    spoken_cents = f"{cents} {'cent' if cents == '1' else 'cents'}"
    if dollars and cents:
        return f"{spoken_dollars}, {spoken_cents}"
    return spoken_dollars if dollars else spoken_cents if cents else "zero dollars"


@functools.lru_cache(maxsize=4096)
def _integer_words(digits: str) -> str:
    """Digits -> words; 1001 to 2999 are read as years, in pairs, except 2000 to 2009 and whole hundreds."""
    digits = digits.lstrip("0") or "0"
    if len(digits) > _INFLECT_DIGITS:
        return _digit_by_digit(digits)
    number = int(digits)
    to_words = _inflect_engine().number_to_words
    if not 1000 < number < 3000:
        return to_words(number, andword="")
    if number == 2000:
        return "two thousand"
    if 2000 < number < 2010:
        return f"two thousand {to_words(number % 100)}"
    if number % 100 == 0:
        return f"{to_words(number // 100)} hundred"
    return to_words(number, andword="", zero="oh", group=2).replace(", ", " ")


@functools.lru_cache(maxsize=1024)
def _ordinal_words(digits: str, suffix: str) -> str:
    """Digits and their ending -> words; unlike plain integers these keep inflect's "and"."""
    if len(digits) > _INFLECT_DIGITS:
        return _digit_by_digit(digits)
    return _inflect_engine().number_to_words(digits + suffix)


def _digit_by_digit(digits: str) -> str:
    return " ".join(_DIGIT_WORDS[int(digit)] for digit in digits)


@functools.cache
def _inflect_engine() -> Any:
    """The `inflect` engine, imported when the first number is met.

    `inflect` decorates 24 functions with `typeguard.typechecked`, and each of these parses and compiles its whole
    4,000-line module anew: 5 seconds per process (measured with inflect 7.6). We pass it nothing but plain ints and
    strings, so the checks are left out while it is imported, which then takes 0.04 s.
    """
    if "inflect" not in sys.modules:
        try:
            import typeguard
        except ImportError:  # inflect before 7.3 checked its arguments in another way
            pass
        else:
            typechecked = typeguard.typechecked
            typeguard.typechecked = _unchecked
            try:
                import inflect
            finally:
                typeguard.typechecked = typechecked
    import inflect

    return inflect.engine()


def _unchecked(target: Any = None, **options: Any) -> Any:
    """Stand-in for the decorator `typeguard.typechecked`, with or without arguments, that changes nothing."""
    return (lambda function: function) if target is None else target


class TextTokenizer:
    """TorToiSe's byte-pair tokenizer: cleaned text to ids and back. Adds no START or STOP; the batch does.

    Ids: 0 = [STOP], 1 = [UNK] (one for each unknown character), 2 = [SPACE], then characters and pieces. The GPT's
    START id is `vocab_size`, one above the last id. Two tokenizers with the same `fingerprint` give the same ids. Can
    be pickled.
    """

    stop_id = STOP_ID
    unk_id = UNK_ID
    space_id = SPACE_ID

    def __init__(self, definition: bytes, source: str = "the tokenizer") -> None:
        """Build from the bytes of a tokenizer.json.

        Args:
            definition: the file's content; kept as it is, so that `save` gives the same bytes back.
            source: how error messages call it, usually the file's path.

        Raises:
            UserError: if this is not a tokenizer in TorToiSe's layout.
        """
        self._definition = definition
        self._source = source
        try:
            self._tokenizer = Tokenizer.from_str(definition.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{source} is not a tokenizer file ({error}); expected a tokenizer.json as written by the tokenizers "
                f"library, in TorToiSe's layout."
            ) from error
        found = tuple(self._tokenizer.id_to_token(token_id) for token_id in range(len(SPECIAL_TOKENS)))
        if found != SPECIAL_TOKENS:
            raise UserError(
                f"{source} is not in TorToiSe's layout: ids 0, 1, 2 are {', '.join(map(str, found))}, expected "
                f"{', '.join(SPECIAL_TOKENS)}. Use the released tokenizer.json, or one made by "
                f"tortoise_hf.text.train_tokenizer."
            )

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Read a tokenizer.json.

        Raises:
            UserError: if the file cannot be read or is not a tokenizer in TorToiSe's layout.
        """
        try:
            definition = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"The tokenizer {path} could not be read ({error.strerror}); expected a tokenizer.json in TorToiSe's "
                f"layout."
            ) from error
        return cls(definition, source=str(path))

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[bytes, str]]:
        return type(self), (self._definition, self._source)

    def __repr__(self) -> str:
        return f"TextTokenizer({self._source!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """Number of text ids, specials included (released tokenizer: 255)."""
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """The sha256 of the tokenizer file, in hexadecimal. Belongs in every cache key that depends on text ids."""
        return hashlib.sha256(self._definition).hexdigest()

    def encode(self, text: str, cleaner: Callable[[str], str] = clean_training_text) -> list[int]:
        """Clean a text and turn it into ids.

        Args:
            text: any text, not cleaned yet.
            cleaner: `clean_training_text` for training data, `clean_text` for text to be spoken.

        Returns:
            T ids in 0..vocab_size-1; empty for an empty text. Holds `unk_id` once for each unknown character.
        """
        return self._tokenizer.encode(_with_space_tokens(cleaner(text))).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into cleaned text. STOP, UNK and ids beyond the vocabulary (START, padding) are left out."""
        known = (token_id for token_id in map(int, ids) if UNK_ID < token_id < self.vocab_size)
        return "".join(" " if token_id == SPACE_ID else self._tokenizer.id_to_token(token_id) for token_id in known)

    def unknown_characters(self, text: str, cleaner: Callable[[str], str] = clean_training_text) -> list[str]:
        """Name the characters of a text that would become [UNK].

        Args:
            text: any text, not cleaned yet.
            cleaner: as in `encode`.

        Returns:
            Each unknown character of the *cleaned* text once, in order of appearance; empty if all are known.
        """
        spaced = _with_space_tokens(cleaner(text))
        encoding = self._tokenizer.encode(spaced)
        unknown = (
            spaced[start:end] for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True) if i == UNK_ID
        )
        return list(dict.fromkeys(unknown))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json this was built from, byte for byte."""
        Path(path).write_bytes(self._definition)


def _with_space_tokens(cleaned: str) -> str:
    # The pre-tokenizer swallows whitespace, so spaces travel as a token. Lower-case text can't spell one itself.
    return cleaned.replace(" ", SPECIAL_TOKENS[SPACE_ID])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a new byte-pair tokenizer in TorToiSe's layout, for a GPT that is trained from scratch.

    The specials come first, then all of `CHARACTERS` whether or not the texts use them, then pieces of words by
    falling frequency. Punctuation is never merged, as in the released vocabulary. The same texts always give the same
    tokenizer.

    Args:
        texts: raw texts; they are cleaned by `clean_training_text`.
        vocab_size: number of ids wanted, at least 40 (3 specials and 37 characters). Fewer come out when the texts
            hold no further pair of letters that occurs twice.

    Returns:
        The tokenizer; `save` writes its tokenizer.json.

    Raises:
        UserError: if vocab_size is below 40.
    """
    from tokenizers import models, pre_tokenizers, trainers

    smallest = len(SPECIAL_TOKENS) + len(CHARACTERS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size must be at least {smallest} (3 special tokens and {len(CHARACTERS)} characters), "
            f"got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK_ID]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(CHARACTERS),
        show_progress=False,
    )
    words = (re.sub(r"[^a-z]+", " ", clean_training_text(text)) for text in texts)
    tokenizer.train_from_iterator(words, trainer)
    trained = json.loads(tokenizer.to_str())
    # Written key by key, merges as "a b": the released layout, which every version of the tokenizers library reads.
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": SPECIAL_TOKENS[UNK_ID],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "vocab": trained["model"]["vocab"],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in trained["model"]["merges"]],
    }
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return TextTokenizer((json.dumps(definition, indent=1) + "\n").encode("utf-8"), source="a newly trained tokenizer")
