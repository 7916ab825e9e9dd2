"""Cleaners and tokenizer against golden rows of the original programs, and on a tokenizer of our own."""

import json
import pickle
import subprocess
import sys
import time

import pytest
from conftest import GOLDEN, reference_path

from tortoise_hf.errors import UserError
from tortoise_hf.text import CHARACTERS, TextTokenizer, clean_text, clean_training_text, train_tokenizer

ROWS = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["rows"]
WORDS = [
    "the rain in spain stays mainly in the plain",
    "the thin thing in the inn",
    "then an ant ran and the van ran too",
]
each_row = pytest.mark.parametrize("row", ROWS, ids=[f"{i:02}" for i in range(len(ROWS))])


@pytest.fixture(scope="module")
def released():
    return TextTokenizer.from_file(reference_path("tokenizer.json"))


@pytest.fixture(scope="module")
def made():
    return train_tokenizer(WORDS, vocab_size=45)


# -- cleaning: needs no file


@each_row
def test_cleaned_text_is_what_the_original_inference_feeds(row):
    assert clean_text(row["text"]) == row["tortoise_cleaned"]


@each_row
def test_cleaned_training_text_is_what_the_original_training_fed(row):
    assert clean_training_text(row["text"]) == row["dlas_cleaned"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,,2 or 3, 4", "twelve or three, four"),
        ("In 2009, 2010 and 1900.", "in two thousand nine, twenty ten and nineteen hundred."),
        ("$0.00", "zero dollars"),
        ("$,5", "five dollars"),
        ("on the 11th", "on the eleventh"),
        ("the 0th", "the zeroth"),
        ("st.co. and Co.St.", "saintco. and companysaint"),
        ("a\x1fb\u00a0c", "a b c"),
        ("1" * 36, clean_text("1" * 36)),
    ],
)
def test_corner_cases_of_numbers_and_abbreviations(text, expected):
    assert clean_text(text) == expected


@pytest.mark.parametrize("length", [37, 5000])
def test_a_number_too_long_for_words_is_read_digit_by_digit(length):
    expected = " ".join(["nine"] * length)
    assert clean_text("9" * length) == expected
    assert clean_text("9" * length + "th") == expected
    assert clean_text("$" + "9" * length) == f"{expected} dollars"


def test_a_lone_symbol_is_emptied_but_not_one_inside_a_sentence():
    assert [clean_training_text(symbol) for symbol in "@#%_=$^&*+\\"] == [""] * 11
    assert clean_training_text("a & b") == "a & b"
    assert clean_training_text("@@") == "@@"


def test_importing_the_module_does_not_import_inflect_and_reading_a_number_leaves_typeguard_alone():
    code = (
        "import sys, tortoise_hf.text as t; assert 'inflect' not in sys.modules; t.clean_text('no number'); "
        "assert 'inflect' not in sys.modules; assert t.clean_text('1984') == 'nineteen eighty-four'; "
        "import inflect; typeguard = sys.modules.get('typeguard'); "
        "assert typeguard is None or typeguard.typechecked.__module__.startswith('typeguard')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the released tokenizer: golden ids


@each_row
def test_ids_are_those_of_the_original_programs(row, released):
    assert released.encode(row["text"], cleaner=clean_text) == row["tortoise_ids"]
    assert released.encode(row["text"]) == row["dlas_ids"]
    assert released.decode(row["tortoise_ids"]) == row["decoded"]


@each_row
def test_texts_the_original_training_refused_hold_unknown_characters(row, released):
    refused_for_characters = bool(released.unknown_characters(row["text"]))
    assert refused_for_characters == (not row["dlas_training_accepts"] and row["text"] != "")


def test_released_tokenizer_has_its_known_size_and_hash(released):
    assert released.vocab_size == 255
    assert released.fingerprint == "d1fa6e9b4741bb75b284331b833347c166ba8b0518e187f7370f123149ed87bb"


# -- a tokenizer of our own: runs everywhere


def test_trained_tokenizer_has_the_released_layout(made, tmp_path):
    made.save(tmp_path / "tokenizer.json")
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = sorted(layout["model"]["vocab"], key=layout["model"]["vocab"].get)
    assert vocab[:40] == ["[STOP]", "[UNK]", "[SPACE]", *CHARACTERS]
    assert len(vocab) == made.vocab_size == 45
    assert layout["model"]["merges"][0] == "i n"  # the most frequent pair of WORDS
    assert all(piece.isalpha() for piece in vocab[40:])
    assert layout["pre_tokenizer"] == {"type": "Whitespace"}
    assert [token["content"] for token in layout["added_tokens"]] == ["[STOP]", "[UNK]", "[SPACE]"]


def test_trained_layout_has_the_keys_of_the_released_file(made, tmp_path):
    made.save(tmp_path / "tokenizer.json")
    ours, theirs = (
        json.loads(path.read_text()) for path in (tmp_path / "tokenizer.json", reference_path("tokenizer.json"))
    )
    assert ours.keys() == theirs.keys()
    assert ours["model"].keys() == theirs["model"].keys()
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert type(ours["model"]["merges"][0]) is type(theirs["model"]["merges"][0])


def test_training_is_repeatable_and_order_of_texts_does_not_matter(made):
    assert train_tokenizer(WORDS, vocab_size=45).fingerprint == made.fingerprint
    assert train_tokenizer(WORDS[::-1], vocab_size=45).fingerprint == made.fingerprint
    assert train_tokenizer(WORDS, vocab_size=44).fingerprint != made.fingerprint


def test_texts_without_repeats_give_fewer_ids_than_wanted():
    assert train_tokenizer([], vocab_size=100).vocab_size == 40


def test_a_vocabulary_smaller_than_the_characters_is_refused():
    with pytest.raises(UserError, match="at least 40"):
        train_tokenizer(WORDS, vocab_size=39)


@each_row
def test_every_golden_text_survives_encoding_and_decoding_but_for_unknown_characters(row, made):
    for cleaner, key in ((clean_text, "tortoise_cleaned"), (clean_training_text, "dlas_cleaned")):
        ids = made.encode(row["text"], cleaner=cleaner)
        unknown = made.unknown_characters(row["text"], cleaner=cleaner)
        known = "".join(character for character in row[key] if character not in unknown)
        assert made.decode(ids) == known
        assert ids.count(made.unk_id) == len(row[key]) - len(known)
        assert set(unknown).isdisjoint({" ", *CHARACTERS})


def test_ids_of_spaces_unknowns_and_nothing(made):
    assert made.encode("") == []
    assert made.encode("  ") == [2]
    assert made.encode("a&&b") == [14, 1, 1, 15]
    assert made.encode("[a]") == [5, 14, 6]
    assert made.encode("[a]", cleaner=clean_text) == [1, 14, 1]
    assert made.encode("in") == [40]
    assert made.unknown_characters("5% & 6% of it") == ["%", "&"]


def test_decoding_leaves_out_stop_start_and_ignored_positions(made):
    assert made.decode([made.vocab_size, 14, 2, 15, 0, 0, -100]) == "a b"


def test_raw_text_cannot_spell_a_special_token(made):
    assert made.stop_id not in made.encode("[STOP]", cleaner=clean_text)
    assert made.encode("[SPACE]").count(made.space_id) == 0


def test_saving_loading_and_pickling_keep_bytes_and_ids(made, tmp_path):
    path = tmp_path / "tokenizer.json"
    made.save(path)
    loaded = TextTokenizer.from_file(path)
    loaded.save(tmp_path / "again.json")
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()
    thawed = pickle.loads(pickle.dumps(loaded))
    assert made.fingerprint == loaded.fingerprint == thawed.fingerprint
    assert made.encode("the rain") == loaded.encode("the rain") == thawed.encode("the rain")


def test_files_that_are_no_tokenizer_are_named(made, tmp_path):
    with pytest.raises(UserError, match=r"absent\.json could not be read"):
        TextTokenizer.from_file(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer file"):
        TextTokenizer.from_file(tmp_path / "bad.json")
    made.save(tmp_path / "other.json")
    (tmp_path / "other.json").write_text((tmp_path / "other.json").read_text().replace("[STOP]", "<s>"))
    with pytest.raises(UserError, match=r"other\.json is not in TorToiSe's layout: ids 0, 1, 2 are <s>"):
        TextTokenizer.from_file(tmp_path / "other.json")


def test_a_corpus_the_size_of_ljspeech_is_encoded_in_seconds(made):
    sentence = (
        "In {n}, Mr. {n} of the commission found the {n}th report worth ${n}.50 to the prison of St. James, he said."
    )
    texts = [sentence.format(n=1000 + n) for n in range(1310)]
    made.encode(texts[0])
    start = time.process_time()
    assert all(1 not in made.encode(text) for text in texts)
    assert (
        time.process_time() - start < 3
    )  # a tenth of LJSpeech, four unusual numbers in every sentence; about 0.3 s here
