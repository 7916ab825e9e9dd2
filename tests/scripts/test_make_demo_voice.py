"""The demo voice as it lies in the repository, and that its script makes the same clips again."""

import shutil
from pathlib import Path

import make_demo_voice
import numpy as np
import pytest
import soundfile
from base_domain import Sentence, Sentences, draw_sentences, grammar
from make_demo_voice import SLT
from synthesizers import speak

from tortoise_hf.errors import UserError
from tortoise_hf.text import clean_training_text, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
VOICE = REPOSITORY / "examples" / "demo_voice"
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")


@pytest.fixture(scope="module")
def rows():
    text = (VOICE / "metadata.csv").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [line.split("|") for line in text.splitlines()]


@pytest.fixture(scope="module")
def infos(rows):
    return [soundfile.info(VOICE / "wavs" / f"{clip_id}.flac") for clip_id, _, _ in rows]


def test_metadata_is_in_the_layout_of_ljspeech(rows):
    assert all(len(row) == 3 for row in rows)
    ids = [row[0] for row in rows]
    assert len(set(ids)) == len(ids) >= 100
    assert {path.stem for path in (VOICE / "wavs").iterdir()} == set(ids)


def test_transcript_and_normalised_transcript_differ_where_there_is_something_to_write_out(rows):
    differing = [row for row in rows if row[1] != row[2]]
    assert 20 <= len(differing) < len(rows)
    assert not any(character.isdigit() for _, _, normalized in rows for character in normalized)
    assert any(not raw.isascii() for _, raw, _ in rows)  # UTF-8 has to be read as such
    assert all(normalized.isascii() for _, _, normalized in rows)


def test_every_text_is_unique_and_can_be_encoded(rows):
    tokenizer = train_tokenizer([], vocab_size=40)
    for column in (1, 2):
        texts = [row[column] for row in rows]
        assert len({clean_training_text(text) for text in texts}) == len(texts)
        assert [text for text in texts if tokenizer.unknown_characters(text)] == []
        assert max(len(tokenizer.encode(text)) for text in texts) <= 200  # even when every character is an id


def test_clips_are_mono_flac_at_22050_hz_between_1_and_6_seconds(infos):
    assert {(info.format, info.samplerate, info.channels, info.subtype) for info in infos} == {
        ("FLAC", 22_050, 1, "PCM_16")
    }
    seconds = [info.duration for info in infos]
    assert min(seconds) >= 1
    assert max(seconds) <= 6


def test_no_clip_is_silent_or_clipped(rows):
    for clip_id, _, _ in rows:
        peak = np.abs(soundfile.read(VOICE / "wavs" / f"{clip_id}.flac")[0]).max()
        assert 0.1 < peak < 0.99, clip_id


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in VOICE.rglob("*") if path.is_file()) < 10_000_000


def test_texts_are_what_the_domain_says(rows):
    sentences = draw_sentences()
    assert [[sentence.printed, sentence.spoken] for sentence in sentences.demo] == [row[1:] for row in rows]
    unseen = (VOICE / "unseen.txt").read_text(encoding="utf-8").splitlines()
    assert [f"{sentence.printed}|{sentence.spoken}" for sentence in sentences.unseen] == unseen
    assert (VOICE / "grammar.jsgf").read_text(encoding="utf-8") == grammar()


def test_every_clip_begins_and_ends_with_a_tenth_of_a_second_of_silence(rows):
    for clip_id, _, _ in rows:
        spoken = np.flatnonzero(soundfile.read(VOICE / "wavs" / f"{clip_id}.flac", dtype="int16")[0])
        length = soundfile.info(VOICE / "wavs" / f"{clip_id}.flac").frames
        assert 2205 <= spoken[0] < 2205 + 220, clip_id
        assert 2205 <= length - 1 - spoken[-1] < 2205 + 220, clip_id


@needs_flite
def test_two_clips_made_again_have_the_stored_samples(rows):
    for clip_id, _, normalized in (rows[3], rows[-1]):
        stored, _ = soundfile.read(VOICE / "wavs" / f"{clip_id}.flac", dtype="int16")
        np.testing.assert_array_equal(speak(normalized, SLT), stored)


@needs_flite
def test_main_writes_a_folder_once_and_again_only_when_told(tmp_path, monkeypatch):
    few = Sentences(
        demo=[Sentence("It is 4 miles.", "It is four miles."), Sentence("Are you there?", "Are you there?")],
        unseen=[Sentence("Is it 5?", "Is it five?")],
        corpus=iter(()),
    )
    monkeypatch.setattr(make_demo_voice, "draw_sentences", lambda: few)
    output = tmp_path / "voice"
    make_demo_voice.main(["--output", str(output)])
    assert (output / "metadata.csv").read_text() == (
        "demo-001|It is 4 miles.|It is four miles.\ndemo-002|Are you there?|Are you there?\n"
    )
    assert (output / "unseen.txt").read_text() == "Is it 5?|Is it five?\n"
    first = {path.name: path.read_bytes() for path in (output / "wavs").iterdir()}
    assert set(first) == {"demo-001.flac", "demo-002.flac"}
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        make_demo_voice.main(["--output", str(output)])
    (output / "README.md").write_text("kept")
    make_demo_voice.main(["--output", str(output), "--overwrite"])
    assert {path.name: path.read_bytes() for path in (output / "wavs").iterdir()} == first
    assert (output / "README.md").read_text() == "kept"


def test_a_missing_flite_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"flite.*was not found on PATH; install it"):
        make_demo_voice.main(["--output", str(tmp_path / "voice")])
    assert not (tmp_path / "voice").exists()
