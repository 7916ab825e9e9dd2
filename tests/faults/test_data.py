"""Clips that vanish or change between preparing and training."""

from __future__ import annotations

import shutil

import numpy as np
import soundfile

from faults.harness import log_of, run, start
from faults.kills import flags, train_script


def test_clips_that_vanish_while_training_are_not_missed_and_changed_ones_are_named(tiny_base, tiny_voice, tmp_path):
    data, copy = tiny_voice(10), tmp_path / "copy"
    whole = flags(tiny_base, data, tmp_path, tmp_path / "whole")
    run(tmp_path / "processes", train_script, whole)
    argv = flags(tiny_base, data, tmp_path, tmp_path / "run", training__max_steps=6)
    shutil.copytree(data / "wavs", copy)
    # All recordings go as soon as the run has begun: it reads the prepared examples alone.
    started = start(tmp_path / "processes", train_script, flags(tiny_base, data, tmp_path, tmp_path / "other"))
    while not (tmp_path / "other" / "run.json").exists() and started.processes[0].is_alive():
        started.processes[0].join(0.01)
    shutil.rmtree(data / "wavs")
    assert started.wait() == [0], started.output()
    assert log_of(tmp_path / "other") == log_of(tmp_path / "whole")
    # Half-way through another run, one clip goes and one is recorded again at the same length.
    shutil.copytree(copy, data / "wavs")
    run(tmp_path / "processes", train_script, argv)
    trained = (tmp_path / "run" / "train_clips.json").read_text()
    gone, changed = [name for name in (f"clip-{i}" for i in range(10)) if f'"{name}"' in trained][:2]
    (data / "wavs" / f"{gone}.wav").unlink()
    waveform, rate = soundfile.read(data / "wavs" / f"{changed}.wav")
    soundfile.write(
        data / "wavs" / f"{changed}.wav", 0.2 * np.random.default_rng(1).standard_normal(len(waveform)), rate
    )
    refused = start(tmp_path / "processes", train_script, flags(tiny_base, data, tmp_path, tmp_path / "run"))
    assert refused.wait() == [1]
    output = refused.output()
    assert f"gone: {gone}" in output
    assert f"changed: {changed}" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    # Bring them back and it goes on.
    shutil.rmtree(data / "wavs")
    shutil.copytree(copy, data / "wavs")
    run(tmp_path / "processes", train_script, flags(tiny_base, data, tmp_path, tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoint-12").is_dir()
