"""The demo's sentences: three sets apart, spoken as our cleaning reads them, all of them in the grammar."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from base_domain import SLOTS, TEMPLATES, draw_sentences, grammar, spoken_words, write_out

from tortoise_hf.text import clean_training_text


@pytest.fixture(scope="module")
def drawn():
    sentences = draw_sentences()
    return sentences.demo, sentences.unseen, list(itertools.islice(sentences.corpus, 6000))


@pytest.fixture(scope="module")
def accepts():
    """Whether the grammar's language holds some words: its rules as one regular expression."""
    rules = dict(re.findall(r"<(\w+)>\s*=\s*(.*?);", grammar(), flags=re.DOTALL))
    assert set(rules) == {*SLOTS, "sentence"}

    def pattern(rule):
        alternatives = [re.escape(" ".join(alternative.split())) for alternative in rules[rule].split("|")]
        inside = "|".join(alternatives).replace(r"\ ", " ")
        return re.sub(r"<(\w+)>", lambda match: f"(?:{pattern(match[1])})", inside)

    language = re.compile(pattern("sentence"))
    return lambda words: language.fullmatch(" ".join(words)) is not None


def test_unseen_texts_are_in_no_other_set_and_no_set_repeats_one(drawn):
    demo, unseen, corpus = ([sentence.words for sentence in sentences] for sentences in drawn)
    assert [len(demo), len(unseen), len(corpus)] == [300, 100, 6000]
    assert all(len(set(sentences)) == len(sentences) for sentences in (demo, unseen, corpus))
    assert set(unseen).isdisjoint([*demo, *corpus])
    assert len(set(demo) - set(corpus)) == 120


def test_the_same_seed_draws_the_same_and_another_seed_others(drawn):
    assert draw_sentences(0).demo == drawn[0]
    assert draw_sentences(0).unseen == drawn[1]
    assert set(draw_sentences(1).demo[:120]).isdisjoint(drawn[0][:120])


def test_what_is_spoken_is_what_our_cleaning_makes_of_the_printed_form(drawn):
    for sentence in itertools.chain(*drawn):
        assert spoken_words(clean_training_text(sentence.printed)) == sentence.words
        assert not any(character.isdigit() for character in sentence.spoken)


@pytest.mark.parametrize(
    "printed, spoken",
    [
        ("Train 42 to Boston leaves at 7:45.", "Train forty-two to Boston leaves at seven forty-five."),
        ("Mr. Wilson paid $3.50 on March 3rd, 1984.", "Mister Wilson paid three dollars, fifty cents on March third, "
         "nineteen eighty-four."),
        ("12 eggs cost $1", "Twelve eggs cost one dollar"),
        ("It closes at 2 o'clock.", "It closes at two o'clock."),
    ],
)  # fmt: skip
def test_numbers_and_abbreviations_are_written_out(printed, spoken):
    assert write_out(printed) == spoken


def test_the_grammar_accepts_every_sentence_and_nothing_else(drawn, accepts):
    for sentence in itertools.chain(*drawn):
        assert accepts(sentence.words), sentence
    words = drawn[0][0].words
    assert not accepts(words[:-1])
    assert not accepts((*words, words[-1]))
    assert not accepts(words[::-1])


def test_sentences_are_short_and_a_corpus_says_every_word_often(drawn):
    lengths = [len(sentence.words) for sentence in drawn[2]]
    assert (min(lengths), max(lengths)) == (5, 13)
    assert 7 < sum(lengths) / len(lengths) < 10
    counts = Counter(word for sentence in drawn[2] for word in sentence.words)
    assert 250 <= len(counts) <= 310
    assert min(counts.values()) >= 15
    assert {word for sentences in drawn[:2] for sentence in sentences for word in sentence.words} <= set(counts)


def test_every_slot_is_used_and_holds_no_value_twice():
    assert {slot for template in TEMPLATES for slot in re.findall(r"\{(\w+)\}", template)} == set(SLOTS)
    for values in SLOTS.values():
        assert len({spoken_words(write_out(value)) for value in values}) == len(values)


def test_the_recognizer_knows_every_word_of_the_grammar():
    pocketsphinx = pytest.importorskip("pocketsphinx")
    dictionary = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text(encoding="utf-8")
    known = {line.split()[0] for line in dictionary.splitlines()}
    words = {
        word
        for text in (*(value for values in SLOTS.values() for value in values), *TEMPLATES)
        for word in spoken_words(write_out(re.sub(r"\{\w+\}", "", text).strip()))
    }
    assert len(words) > 250
    assert words <= known
