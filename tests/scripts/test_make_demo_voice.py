"""The demo voice as it lies in the repository, and that its script makes the same clips again."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tortoise_hf.errors import UserError
from tortoise_hf.text import clean_training_text, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
VOICE = REPOSITORY / "examples" / "demo_voice"
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(REPOSITORY / "scripts" / "make_demo_voice.py"))


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
    assert len(set(ids)) == len(ids) >= 80
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


def test_clips_are_mono_flac_at_22050_hz_between_2_and_8_seconds(infos):
    assert {(info.format, info.samplerate, info.channels, info.subtype) for info in infos} == {
        ("FLAC", 22_050, 1, "PCM_16")
    }
    seconds = [info.duration for info in infos]
    assert min(seconds) >= 2
    assert max(seconds) <= 8


def test_no_clip_is_silent_or_clipped(rows):
    for clip_id, _, _ in rows:
        peak = np.abs(soundfile.read(VOICE / "wavs" / f"{clip_id}.flac")[0]).max()
        assert 0.1 < peak < 0.99, clip_id


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in VOICE.rglob("*") if path.is_file()) < 6_000_000


def test_metadata_is_what_the_sentences_say(rows, script):
    sentences = script["read_sentences"](script["SENTENCES"])
    assert [[sentence.clip_id, sentence.transcript, sentence.normalized] for sentence in sentences] == rows


@needs_flite
def test_two_clips_made_again_have_the_stored_samples(rows, script):
    flite = script["find_flite"]()
    for clip_id, _, normalized in (rows[3], rows[-1]):
        stored, _ = soundfile.read(VOICE / "wavs" / f"{clip_id}.flac", dtype="int16")
        np.testing.assert_array_equal(script["speak"](normalized, flite), stored)


@needs_flite
def test_main_writes_a_folder_once_and_again_only_when_told(script, tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("It is 4 miles.|It is four miles.\nAre you there?\n")
    output = tmp_path / "voice"
    arguments = ["--sentences", str(sentences), "--output", str(output)]
    script["main"](arguments)
    assert (output / "metadata.csv").read_text() == (
        "demo-001|It is 4 miles.|It is four miles.\ndemo-002|Are you there?|Are you there?\n"
    )
    first = {path.name: path.read_bytes() for path in (output / "wavs").iterdir()}
    assert set(first) == {"demo-001.flac", "demo-002.flac"}
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        script["main"](arguments)
    (output / "README.md").write_text("kept")
    script["main"]([*arguments, "--overwrite"])
    assert {path.name: path.read_bytes() for path in (output / "wavs").iterdir()} == first
    assert (output / "README.md").read_text() == "kept"


def test_a_missing_flite_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"flite.*was not found on PATH; install it"):
        script["main"](["--output", str(tmp_path / "voice")])
    assert not (tmp_path / "voice").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("One.\nOne.\n", "line 2 is spoken like line 1"),
        ("a|b|c\n", "line 1: expected"),
        ("One.\n\nTwo.\n", "line 2: expected"),
    ],
)
def test_sentences_that_cannot_be_used_are_named_by_line(script, tmp_path, text, message):
    path = tmp_path / "sentences.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        script["read_sentences"](path)
