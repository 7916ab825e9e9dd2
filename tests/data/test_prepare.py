"""A dataset folder becomes examples and a report; what was computed before is not computed again."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from voice_maker import (
    MEL_NORMS,
    config,
    load_dvae,
    make_voice,
    prepare,
    refuse_to_load,
    sentence,
    tokenizer,
    waveform,
    write_clip,
    write_list,
)

from tortoise_hf.audio import SAMPLE_RATE, LogMel
from tortoise_hf.data import examples as examples_module
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.prepare import Prepared, look_over, prepare_dataset
from tortoise_hf.errors import UserError


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Lengths of the clips that were encoded, in order."""
    lengths: list[int] = []
    encode = examples_module.ClipEncoder.encode

    def spy(self, samples):
        lengths.append(len(samples))
        return encode(self, samples)

    monkeypatch.setattr(examples_module.ClipEncoder, "encode", spy)
    return lengths


def reasons(prepared: Prepared) -> dict[str, list[str]]:
    """Reason -> clips left out for it."""
    return {reason: [row.clip_id for row in rows] for reason, rows in prepared.report.dropped.items()}


def clips(prepared: Prepared) -> dict[str, dict]:
    """Clip id -> example without the recording's place, training and evaluation together."""
    parts = [part.remove_columns("audio_path") for part in (prepared.train, prepared.eval)]
    return {row["clip_id"]: row for part in parts for row in part}


def shards(root: Path) -> list[Path]:
    return sorted((root.parent / "cache" / "clips").glob("*/shard-*.arrow"))


def test_examples_hold_what_training_needs(tmp_path):
    prepared = prepare(make_voice(tmp_path / "voice", [1.0, 2.0, 1.5]), min_eval_clips=1)
    assert sorted(clips(prepared)) == ["clip-000", "clip-001", "clip-002"]
    example = clips(prepared)["clip-001"]
    samples = torch.from_numpy(soundfile.read(tmp_path / "voice/wavs/clip-001.wav", dtype="float32")[0])
    padded = torch.nn.functional.pad(samples, (0, 255_995 - len(samples)))
    mel = LogMel(MEL_NORMS)(padded)
    assert example["num_samples"] == 2 * SAMPLE_RATE
    assert example["text"] == sentence(1)
    assert example["text_ids"] == tokenizer().encode(sentence(1))
    assert example["mel_codes"] == load_dvae().encode(mel)[0, : 2 * SAMPLE_RATE // 1024 + 1].tolist()
    assert example["num_positions"] == 1 + len(example["text_ids"]) + 3 + len(example["mel_codes"]) + 1
    frames = np.array(example["mel"], dtype=np.float32).reshape(-1, 80)
    assert len(frames) > 2 * SAMPLE_RATE / 256
    np.testing.assert_allclose(frames, mel[0, :, : len(frames)].T, atol=1e-3, rtol=1e-3)


def test_examples_keep_the_order_of_the_list(tmp_path):
    root = make_voice(tmp_path / "voice", [1.0] * 5)
    first = prepare(root, eval_fraction=0)
    # A later change must not move clips about: a resumed run counts on their order.
    write_clip(root / "wavs" / "clip-001.wav", 1.25, seed=9)
    again = prepare(root, eval_fraction=0)
    assert first.train["clip_id"][:] == again.train["clip_id"][:] == [f"clip-{i:03}" for i in range(5)]


def test_every_row_is_kept_or_reported(tmp_path):
    root = make_voice(tmp_path / "voice", [1.0, 1.0])
    wavs = root / "wavs"
    write_clip(wavs / "short.wav", 0.59)
    write_clip(wavs / "long.wav", 12.0)
    for name in ("hash", "words", "empty", "symbol", "twice"):
        write_clip(wavs / f"{name}.wav", 1.0)
    (wavs / "garbage.wav").write_bytes(b"RIFF not really")
    (wavs / "nothing.wav").touch()
    whole = (wavs / "clip-000.wav").read_bytes()
    (wavs / "cut.wav").write_bytes(whole[: len(whole) // 2])
    samples = waveform(SAMPLE_RATE)
    samples[100] = np.nan
    soundfile.write(wavs / "nan.wav", samples, SAMPLE_RATE, "FLOAT")
    stereo = np.stack([0.0009 * np.sign(waveform(SAMPLE_RATE)), waveform(SAMPLE_RATE)], axis=1)
    soundfile.write(wavs / "second.wav", stereo, SAMPLE_RATE, "FLOAT")  # the first channel is the one that counts
    write_list(
        root / "metadata.csv",
        [
            ("clip-000", sentence(0)),
            ("gone", "where is it"),
            ("short", "yes"),
            ("long", "a long story"),
            ("hash", "the # sign"),
            ("words", "river " * 100),
            ("empty", ""),
            ("symbol", "$"),
            ("twice", "once"),
            ("twice", "and again"),
            ("garbage", "noise"),
            ("nothing", "silence"),
            ("cut", "this ends ear"),
            ("nan", "not a number"),
            ("second", "on the other side"),
            ("clip-001", sentence(1)),
        ],
    )
    prepared = prepare(root)
    assert sorted(clips(prepared)) == ["clip-000", "clip-001", "twice"]
    assert reasons(prepared) == {
        "missing_file": ["gone"],
        "too_short": ["short"],
        "too_long": ["long"],
        "unknown_characters": ["hash"],
        "too_many_text_ids": ["words"],
        "empty_text": ["empty", "symbol"],
        "duplicate_id": ["twice"],
        "unreadable": ["garbage", "nothing"],
        "truncated": ["cut"],
        "non_finite": ["nan"],
        "silent": ["second"],
    }
    report = prepared.report
    assert report.total == 16 == report.kept + report.num_dropped
    assert report.minutes == pytest.approx(3 / 60)
    assert report.seconds_histogram == [0, 3]
    assert sorted(row.row for rows in report.dropped.values() for row in rows) == [*range(2, 9), *range(10, 16)]
    summary = report.summary()
    assert "kept 3 of 16 clips" in summary
    assert f"metadata.csv line 2, gone: {wavs / 'gone.wav'}" in summary
    assert "metadata.csv line 5, hash: the text holds #" in summary
    assert "metadata.csv line 10, twice: has the clip id of metadata.csv line 9" in summary
    assert "metadata.csv line 3, short: 0.59 s, at least 0.60 s are kept" in summary
    assert "metadata.csv line 4, long: 12.00 s, at most 11.61 s are kept" in summary
    # Known now, told again the next time without a look at the files.
    again = prepare(root, dvae=refuse_to_load)
    assert again.report == report


def test_limits_are_settings(tmp_path):
    root = make_voice(tmp_path / "voice", [0.4, 1.0, 3.0])
    assert reasons(prepare(root)) == {"too_short": ["clip-000"]}
    assert reasons(prepare(root, min_seconds=0.3, max_samples=30_000)) == {"too_long": ["clip-002"]}
    assert "too_many_text_ids" in reasons(prepare(root, max_text_ids=len(tokenizer().encode(sentence(1)))))


def test_the_second_run_opens_no_audio_file(tmp_path, monkeypatch, encoded):
    root = make_voice(tmp_path / "voice", [1.0, 1.5, 2.0])
    first = prepare(root)
    assert len(encoded) == 3
    read_bytes = Path.read_bytes

    def refuse_audio(self):
        assert self.suffix != ".wav", f"{self} was opened"
        return read_bytes(self)

    def refuse(*_args, **_kwargs):
        raise AssertionError("an audio file was opened")

    monkeypatch.setattr(Path, "read_bytes", refuse_audio)
    monkeypatch.setattr(soundfile, "SoundFile", refuse)
    monkeypatch.setattr(soundfile, "read", refuse)
    second = prepare(root, dvae=refuse_to_load)
    assert clips(second) == clips(first)
    assert len(encoded) == 3


def test_a_changed_clip_computes_only_itself(tmp_path, encoded):
    root = make_voice(tmp_path / "voice", [1.0, 1.5, 2.0])
    before = clips(prepare(root))
    encoded.clear()
    write_clip(root / "wavs" / "clip-001.wav", 1.7, seed=1)
    after = clips(prepare(root))
    assert encoded == [round(1.7 * SAMPLE_RATE)]
    assert after["clip-001"]["num_samples"] == encoded[0]
    assert after["clip-000"] == before["clip-000"]
    assert after["clip-002"] == before["clip-002"]


def test_a_changed_text_encodes_no_audio(tmp_path, encoded):
    root = make_voice(tmp_path / "voice", [1.0, 1.5])
    prepare(root)
    encoded.clear()
    write_list(root / "metadata.csv", [("clip-000", "something else"), ("clip-001", sentence(1))])
    changed = clips(prepare(root, dvae=refuse_to_load))
    assert changed["clip-000"]["text_ids"] == tokenizer().encode("something else")
    assert encoded == []


def test_other_names_of_the_same_places_compute_nothing(tmp_path, monkeypatch):
    root = make_voice(tmp_path / "voice", [1.0, 1.5])
    prepare(root)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for other, cache in (("voice", "cache"), ("link", "~/cache")):
        assert len(clips(prepare(Path(other), dvae=refuse_to_load, cache_dir=cache))) == 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    root = make_voice(tmp_path / "voice", [1.0])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache/texts/.* can't be written \(Not a directory\).*data\.cache_dir"):
        prepare(root)


@pytest.mark.parametrize("what", ["dvae", "norms"])
def test_other_weights_or_norms_encode_everything_anew(tmp_path, encoded, what):
    root = make_voice(tmp_path / "voice", [1.0, 1.5])
    prepare(root)
    norms = MEL_NORMS * 2 if what == "norms" else MEL_NORMS
    prepare_dataset(
        config(root), tokenizer(), norms, load_dvae, "other" if what == "dvae" else "golden", show_progress=False
    )
    assert len(encoded) == 4


def test_a_clip_does_not_depend_on_its_neighbours(tmp_path):
    together = make_voice(tmp_path / "a" / "voice", [1.0, 3.0, 2.0])
    alone = tmp_path / "b" / "voice"
    (alone / "wavs").mkdir(parents=True)
    shutil.copy(together / "wavs" / "clip-002.wav", alone / "wavs")
    write_list(alone / "metadata.csv", [("clip-002", sentence(2))])
    assert clips(prepare(alone))["clip-002"] == clips(prepare(together))["clip-002"]


def test_a_truncated_shard_is_made_again(tmp_path, caplog, encoded):
    root = make_voice(tmp_path / "voice", [1.0] * 20)
    first = clips(prepare(root))
    broken = min(shards(root), key=lambda path: path.stat().st_size)
    os.truncate(broken, broken.stat().st_size // 2)
    encoded.clear()
    assert clips(prepare(root)) == first
    assert 0 < len(encoded) < 20
    assert f"{broken} are damaged" in caplog.text


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, encoded):
    root = make_voice(tmp_path / "voice", [0.7] * 40)

    def prepare_and_die():
        encode = examples_module.ClipEncoder.encode

        def die_at_the_20th(self, samples):
            if len(encoded) == 20:
                os._exit(9)
            return encode(self, samples)

        examples_module.ClipEncoder.encode = die_at_the_20th
        prepare(root)

    run = multiprocessing.get_context("fork").Process(target=prepare_and_die)
    run.start()
    run.join()
    assert run.exitcode == 9
    assert len(clips(prepare(root))) == 40
    assert len(encoded) == 24  # one batch of 16 was finished


def test_processes_share_the_work_and_change_nothing(tmp_path):
    root = make_voice(tmp_path / "voice", [0.7 + 0.01 * i for i in range(40)])
    together = clips(prepare(root, num_proc=2))
    shutil.rmtree(tmp_path / "cache")
    assert clips(prepare(root)) == together


def test_runs_side_by_side_share_one_cache(tmp_path):
    root = make_voice(tmp_path / "voice", [0.7] * 20)
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=prepare, args=(root,)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(clips(prepare(root, dvae=refuse_to_load))) == 20


def test_missing_error_stops_at_the_first_with_counts(tmp_path):
    root = make_voice(tmp_path / "voice", [1.0] * 4)
    (root / "wavs" / "clip-001.wav").unlink()
    (root / "wavs" / "clip-003.wav").unlink()
    with pytest.raises(
        UserError, match=r"metadata\.csv line 2 \(clip-001\): .*clip-001\.wav.*; 2 of 4 clips were found"
    ):
        prepare(root, missing="error")
    assert reasons(prepare(root)) == {"missing_file": ["clip-001", "clip-003"]}


def test_nothing_usable_stops_in_one_sentence(tmp_path):
    root = make_voice(tmp_path / "voice", [0.2, 0.3])
    with pytest.raises(UserError, match=r"none of the 2 clips can be used \(2 too_short;"):
        prepare(root)


def test_a_file_that_vanishes_meanwhile_is_reported(tmp_path, monkeypatch):
    from tortoise_hf.data import prepare as prepare_module

    root = make_voice(tmp_path / "voice", [1.0, 1.0])
    read_rows = prepare_module.read_rows

    def read_and_remove(cfg):
        raw = read_rows(cfg)
        (root / "wavs" / "clip-000.wav").unlink()
        return raw

    monkeypatch.setattr(prepare_module, "read_rows", read_and_remove)
    prepared = prepare(root)
    assert reasons(prepared) == {"unreadable": ["clip-000"]}
    assert "can't be read (No such file or directory)" in prepared.report.summary()


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_datasets_are_prepared_with_warnings(tmp_path, count):
    prepared = prepare(make_voice(tmp_path / "voice", [1.0] * count))
    assert len(prepared.train) == 1
    assert len(prepared.eval) == count - 1
    assert prepared.report.num_self_conditioned == 1
    assert any("conditioned on themselves" in warning for warning in prepared.report.warnings)
    assert any("no clip to evaluate on" in warning for warning in prepared.report.warnings) == (count == 1)


def test_given_lists_are_the_split_and_shared_texts_are_told(tmp_path):
    root = make_voice(tmp_path / "voice", [1.0] * 5)
    (root / "metadata.csv").unlink()
    (root / "train.txt").write_text("".join(f"wavs/clip-00{i}.wav|{sentence(i)}\n" for i in (0, 1, 2)))
    (root / "val.txt").write_text(f"wavs/clip-003.wav|{sentence(3)}\nwavs/clip-004.wav|{sentence(0).upper()}\n")
    prepared = prepare(root)
    assert prepared.train["clip_id"][:] == ["clip-000", "clip-001", "clip-002"]
    assert prepared.eval["clip_id"][:] == ["clip-003", "clip-004"]
    assert (prepared.report.num_train, prepared.report.num_eval) == (3, 2)
    (warning,) = prepared.report.warnings
    assert warning.startswith(
        f"1 of 2 evaluation clips say what a training clip says as well (the first: '{sentence(0)}'"
    )


def test_only_evaluation_clips_left_is_an_error(tmp_path):
    root = make_voice(tmp_path / "voice", [0.2, 1.0])
    (root / "metadata.csv").unlink()
    (root / "train.txt").write_text(f"wavs/clip-000.wav|{sentence(0)}\n")
    (root / "val.txt").write_text(f"wavs/clip-001.wav|{sentence(1)}\n")
    with pytest.raises(UserError, match="none is left to train on"):
        prepare(root)


def test_examples_are_mapped_not_loaded(tmp_path):
    prepared = prepare(make_voice(tmp_path / "voice", [1.0] * 20))
    assert {Path(file["filename"]) for file in prepared.train.cache_files} == set(shards(tmp_path / "voice"))


def test_a_first_look_needs_no_base(tmp_path):
    voice = make_voice(tmp_path / "voice", [1.0, 2.0, 0.2, 20.0])
    (voice / "wavs" / "broken.wav").write_text("no sound")
    with (voice / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("broken|Broken.|Broken.\ngone|Gone.|Gone.\n")
    said = look_over(config(voice), read_rows(config(voice)))
    assert "at first sight 2 of 6 clips (0.1 minutes)." in said
    for reason in ("missing_file", "unreadable", "too_short", "too_long"):
        assert f"left out, {reason}: 1. " in said
