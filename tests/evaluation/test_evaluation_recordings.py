"""Where an evaluation's recordings and texts come from."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from tortoise_hf.config import DataConfig
from tortoise_hf.errors import UserError
from tortoise_hf.evaluation.recordings import read_texts, recordings_in, recordings_of_run, voices_in


def make_run(folder, voice, trained):
    """What scripts/train.py leaves, as far as an evaluation reads it."""
    folder.mkdir()
    record = {"config": {"data": dataclasses.asdict(DataConfig(root=str(voice)))}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "train_clips.json").write_text(json.dumps({f"clip-{number}": "0" for number in trained}))
    return folder


def test_what_a_run_held_out(tmp_path, tiny_voice):
    voice = tiny_voice(8)
    (voice / "wavs" / "clip-7.wav").write_bytes(b"no sound")
    found = recordings_of_run(make_run(tmp_path / "run", voice, range(5)))
    assert {clip.path.stem for clip in found.known} == {f"clip-{number}" for number in range(5)}
    assert {clip.path.stem for clip in found.held_out} == {"clip-5", "clip-6"}
    assert all(0.7 <= clip.seconds <= 2 for clip in found.known)
    assert "kettle" in next(clip.text for clip in found.known if clip.path.stem == "clip-0")
    longest = max(found.known, key=lambda clip: clip.seconds)
    assert found.reference_clips()[0] == longest.path  # the nearest to 8 s
    assert len(found.reference_clips()) == 4


def test_runs_that_are_none(tmp_path, tiny_voice):
    with pytest.raises(UserError, match="not the folder of a run"):
        recordings_of_run(tmp_path)
    with pytest.raises(UserError, match="0 clips it held out"):
        recordings_of_run(make_run(tmp_path / "run", tiny_voice(4), range(4)))


def test_some_of_a_folder_are_set_aside(tiny_voice):
    voice = tiny_voice(8)
    found = recordings_in(str(voice), 3, seed=1)
    assert (len(found.held_out), len(found.known)) == (3, 5)
    assert not {clip.path for clip in found.held_out} & {clip.path for clip in found.known}
    assert recordings_in(str(voice), 3, seed=1) == found
    assert recordings_in(str(voice), 3, seed=2) != found
    assert len(recordings_in(str(voice), 50).held_out) == 4


def test_several_speakers(tmp_path, tiny_voice):
    corpus = make_corpus(tiny_voice(16), 4)
    with pytest.raises(UserError, match=r"several speakers \(s0, s1, s2, s3\); say whose with --speaker"):
        recordings_in(str(corpus), 3)
    with pytest.raises(UserError, match="no recordings of s9; it has of: s0"):
        recordings_in(str(corpus), 3, speaker="s9")
    found = recordings_in(str(corpus), 2, speaker="s1")
    assert {clip.path.stem for clip in [*found.held_out, *found.known]} == {f"clip-{n}" for n in (1, 5, 9, 13)}
    voices = voices_in(str(corpus), "s1", 3)
    assert list(voices) == ["s0", "s2", "s3"]
    assert [len(clips) for clips in voices.values()] == [3, 3, 3]


def make_corpus(voice, num_speakers):
    """The recordings as if different people had made them in turn."""
    lines = (voice / "metadata.csv").read_text().splitlines()
    rows = [f"wavs/{line.split('|')[0]}.wav|{line.split('|')[1]}|s{n % num_speakers}" for n, line in enumerate(lines)]
    (voice / "metadata.csv").write_text("\n".join(["audio_file|text|speaker", *rows]) + "\n")
    return voice


def test_a_folder_for_each_voice(tmp_path, tiny_voice):
    for name in ("ann", "bob"):
        shutil.copytree(tiny_voice(5, name) / "wavs", tmp_path / "voices" / name)
    assert {name: len(clips) for name, clips in voices_in(str(tmp_path / "voices"), "", 9).items()} == {
        "ann": 5,
        "bob": 5,
    }


def test_voices_that_cannot_be_told_apart(tmp_path, tiny_voice):
    with pytest.raises(UserError, match="doesn't tell voices apart"):
        voices_in(str(tiny_voice(8)), "", 9)
    with pytest.raises(UserError, match="2 recordings of s0, at least 4"):
        voices_in(str(make_corpus(tiny_voice(8, "few"), 4)), "", 9)


def test_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("One line.\n\n  ...\nRoom 5.|Room five.\n")
    assert read_texts(path) == ["One line.", "Room 5."]
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        read_texts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_texts(path)
