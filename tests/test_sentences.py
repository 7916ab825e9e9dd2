"""Splitting long texts: sentences, quotations, paragraphs, and texts that leave no good place to cut."""

from __future__ import annotations

import random
import re
import time

import pytest

from tortoise_hf.sentences import split_text


def texts(text, **options):
    return [piece.text for piece in split_text(text, **options)]


def squeezed(text):
    return re.sub(r"\s", "", text)


SENTENCE = "The kettle is on, and nobody has noticed it yet. "


def test_short_texts_stay_whole():
    assert texts("Hello.") == ["Hello."]
    assert texts("  Two sentences. One  line\nand a half. ") == ["Two sentences. One line and a half."]
    assert texts(" \n\n \t") == []
    assert texts("") == []


def test_long_texts_are_cut_between_sentences():
    pieces = texts(SENTENCE * 50)
    assert len(pieces) > 8
    assert all(piece.endswith("yet.") for piece in pieces)
    assert all(200 <= len(piece) <= 300 for piece in pieces[:-1])


@pytest.mark.parametrize(
    "text", ["Dr. Brown met Mrs. Hill.", "J. R. Smith paid $3.50 for it.", "Bring fruit, e.g. pears."]
)
def test_dots_that_end_nothing(text):
    assert texts(text, desired=1) == [text]


def test_quotations_stay_together():
    quotation = 'She said, "Come in. Sit down. Have you eaten? There is soup." Then she left.'
    assert texts(quotation, desired=1) == [
        'She said, "Come in. Sit down. Have you eaten? There is soup."',
        "Then she left.",
    ]
    assert texts(quotation.replace('"', "“", 1).replace('"', "”"), desired=1)[1] == "Then she left."
    # A mark without a partner holds nothing together.
    assert texts('It was 6" long. It was green.', desired=1) == ['It was 6" long.', "It was green."]
    long = '"' + "This goes on. " * 60 + 'End."'
    assert all(len(piece) <= 300 and piece.endswith((".", '."')) for piece in texts(long))


def test_paragraphs_end_pieces():
    pieces = split_text("One.\n\nTwo. Three.\n \nFour.")
    assert [(piece.text, piece.ends_paragraph) for piece in pieces] == [
        ("One.", True),
        ("Two. Three.", True),
        ("Four.", True),
    ]
    assert [piece.ends_paragraph for piece in split_text(SENTENCE * 10)] == [False] * (
        len(texts(SENTENCE * 10)) - 1
    ) + [True]


def test_long_sentences_are_cut_at_commas_then_words():
    clauses = texts("a long clause of words, " * 40 + "and an end.")
    assert all(len(piece) <= 300 for piece in clauses)
    assert all(piece.endswith((",", ".")) for piece in clauses)
    words = texts("word " * 500)
    assert all(set(piece.split()) == {"word"} and len(piece) <= 300 for piece in words)


def test_a_word_is_only_cut_if_it_alone_is_too_long():
    pieces = texts("short " + "x" * 1000 + " end")
    assert all(len(piece) <= 300 for piece in pieces)
    assert squeezed("".join(pieces)) == "short" + "x" * 1000 + "end"


def test_pieces_fit_the_number_of_tokens():
    fits = lambda piece: len(piece) <= 40  # noqa: E731 - a stand-in for a tokenizer that makes many
    assert all(fits(piece) for piece in texts(SENTENCE * 5, fits=fits))


def test_nothing_is_lost_and_it_is_quick():
    rng = random.Random(0)
    alphabet = 'ab.,;:!?"“”—- \n\nDr.É…🙂'
    started = time.perf_counter()
    for length in [0, 1, 2, 5, 50, 299, 300, 301, 2000] * 5 + [10_000]:
        text = "".join(rng.choice(alphabet) for _ in range(length))
        pieces = split_text(text)
        assert squeezed("".join(piece.text for piece in pieces)) == squeezed(text)
        assert all(0 < len(piece.text) <= 300 for piece in pieces)
    assert time.perf_counter() - started < 20
