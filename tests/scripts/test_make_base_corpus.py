"""The corpus of the demo's base: who speaks, what is written, when it is refused."""

import shutil
from collections import Counter
from importlib.util import find_spec

import make_base_corpus
import numpy as np
import pytest
import soundfile
import synthesizers
from base_domain import draw_sentences
from make_demo_voice import SLT

from tortoise_hf.config import DataConfig
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.errors import UserError

needs_synthesizers = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite or espeak-ng is not installed"
)
needs_pyworld = pytest.mark.skipif(find_spec("pyworld") is None, reason="pyworld is not installed")
RATE = 22_050


def tone(seconds, lead=0.0, tail=0.0, rate=16_000):
    """A loud tone of 200 Hz between stretches of faint noise."""
    noise = np.random.default_rng(0).normal(0, 1e-4, round((lead + seconds + tail) * rate))
    first, last = round(lead * rate), round((lead + seconds) * rate)
    noise[first:last] += 0.5 * np.sin(2 * np.pi * 200 * np.arange(last - first) / rate)
    return noise


@pytest.fixture
def spoken(monkeypatch, tmp_path):
    """Stands in for both synthesizers: writes a tone of 0.1 s per word and keeps the commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        text = command[command.index("-t") + 1] if "-t" in command else command[-1]
        path = command[command.index("-o" if "-o" in command else "-w") + 1]
        soundfile.write(path, tone(0.1 * len(text.split()), lead=0.3, tail=0.2), 16_000)
        return synthesizers.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(synthesizers, "find_program", str)
    monkeypatch.setattr(make_base_corpus, "find_program", str)
    monkeypatch.setattr(synthesizers.subprocess, "run", run)
    monkeypatch.setattr(synthesizers, "_change_pitch", lambda samples, *_: samples)  # pyworld may not be installed
    return commands


def make(output, **settings):
    settings = {"hours": 30 / 3600, "processes": 1} | settings
    return make_base_corpus.make_base_corpus(output, **settings)


def test_the_demo_voice_is_not_among_the_speakers_and_most_voices_differ():
    speakers = make_base_corpus.SPEAKERS
    assert SLT.voice not in {speaker.voice for speaker in speakers}
    assert len({speaker.name for speaker in speakers}) == len(speakers) >= 150
    assert len({(speaker.voice, speaker.options, speaker.shift, speaker.pitch) for speaker in speakers}) == len(
        speakers
    )
    assert len({speaker.gains for speaker in speakers}) == len(speakers)
    assert all(len(speaker.gains) == len(synthesizers.GAIN_FREQUENCIES) for speaker in speakers)


def test_the_corpus_is_read_as_rows_with_speakers_and_texts_of_the_domain(spoken, tmp_path, monkeypatch):
    monkeypatch.setattr(make_base_corpus, "SPEAKERS", make_base_corpus.SPEAKERS[:12])
    num_samples = make(tmp_path / "corpus")
    rows = read_rows(DataConfig(root=str(tmp_path / "corpus"))).train
    assert set(rows["problem"]) == {""}
    assert Counter(rows["speaker"]).keys() == {speaker.name for speaker in make_base_corpus.SPEAKERS}
    corpus = draw_sentences(0).corpus
    for index, text in enumerate(rows["text"]):
        sentence = next(corpus)
        assert text == (sentence.printed if index // len(make_base_corpus.SPEAKERS) % 2 else sentence.spoken)
    stored = sum(soundfile.info(path).frames for path in rows["audio_path"])
    assert stored == num_samples.total()
    assert 30 <= stored / RATE < 32
    assert len(rows) > 1.5 * len(make_base_corpus.SPEAKERS)


def test_the_same_seed_gives_the_same_files(spoken, tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "two")
    make(tmp_path / "three", seed=1)
    texts = [(tmp_path / name / "metadata.csv").read_text() for name in ("one", "two", "three")]
    assert texts[0] == texts[1] != texts[2]
    clips = [{path.name: path.read_bytes() for path in (tmp_path / name / "wavs").iterdir()} for name in ("one", "two")]
    assert clips[0] == clips[1]


@needs_synthesizers
@needs_pyworld
def test_several_processes_give_the_same_files(tmp_path):
    make(tmp_path / "one", hours=20 / 3600)
    make(tmp_path / "two", hours=20 / 3600, processes=2)
    clips = [{path.name: path.read_bytes() for path in (tmp_path / name / "wavs").iterdir()} for name in ("one", "two")]
    assert len(clips[0]) > 4
    assert clips[0] == clips[1]


def test_a_folder_that_holds_something_is_replaced_only_when_told(spoken, tmp_path):
    output = tmp_path / "corpus"
    make(output)
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        make(output)
    (output / "notes.txt").write_text("kept")
    many = len(list((output / "wavs").iterdir()))
    make(output, hours=10 / 3600, overwrite=True)
    assert (output / "notes.txt").read_text() == "kept"
    num_lines = len((output / "metadata.csv").read_text().splitlines()) - 1
    assert len(list((output / "wavs").iterdir())) == num_lines < many


def test_clips_have_a_tenth_of_a_second_of_silence_around_speech_of_one_level(spoken):
    clip = synthesizers.speak("one two three four five", SLT)
    assert clip.dtype == np.int16
    silence = round(0.1 * RATE)
    assert not clip[:silence].any()
    assert not clip[-silence:].any()
    speech = clip[silence:-silence] / 32768
    assert len(speech) / RATE == pytest.approx(0.5, abs=0.011)
    assert np.sqrt(np.mean(speech**2)) == pytest.approx(0.1, rel=0.03)
    assert abs(speech[:50]).max() > 0.05  # sound right after the silence


def test_a_shift_plays_faster_and_higher(spoken):
    speaker = synthesizers.Speaker("high", "flite", "rms", shift=1.25)
    speech = synthesizers.speak("one two three four five", speaker)[2205:-2205] / 32768.0
    assert len(speech) / RATE == pytest.approx(0.4, abs=0.011)
    spectrum = np.abs(np.fft.rfft(speech))
    assert spectrum.argmax() * RATE / len(speech) == pytest.approx(250, abs=5)


def test_gains_change_the_spectrum_as_they_say():
    noise = np.random.default_rng(0).normal(size=RATE)
    gains = (0.0, 0.0, 6.0, -6.0, 0.0, 0.0)
    change = np.abs(np.fft.rfft(synthesizers._equalize(noise, gains))) / np.abs(np.fft.rfft(noise))
    decibels = [20 * np.log10(np.median(change[hz - 20 : hz + 20])) for hz in (150, 1000, 2500, 8000)]
    assert decibels == pytest.approx([0, 6, -6, 0], abs=0.5)


@needs_synthesizers
@needs_pyworld
def test_a_pitch_is_changed_without_the_duration():
    def pitch(clip: np.ndarray) -> float:
        """Median Hz of the loud half of the windows, by autocorrelation."""
        windows = clip[: len(clip) // 1024 * 1024].reshape(-1, 1024).astype(float)
        loud = windows[(windows**2).mean(1) > np.median((windows**2).mean(1))]
        correlations = [np.correlate(window, window, "full")[1023:] for window in loud]
        return float(np.median([RATE / (80 + each[80:300].argmax()) for each in correlations]))

    plain = synthesizers.speak("Where is the red table?", synthesizers.Speaker("rms", "flite", "rms"))
    high = synthesizers.speak("Where is the red table?", synthesizers.Speaker("high", "flite", "rms", pitch=1.6))
    assert pitch(high) / pitch(plain) == pytest.approx(1.6, rel=0.1)
    assert len(high) == pytest.approx(len(plain), rel=0.02)


def test_a_missing_synthesizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"flite.*was not found on PATH; install it"):
        make_base_corpus.main(["--output", str(tmp_path / "corpus")])
    assert not (tmp_path / "corpus").exists()


def test_a_failing_synthesizer_is_told(tmp_path, monkeypatch):
    program = tmp_path / "flite"
    program.write_text("#!/bin/sh\necho no such voice >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"flite could not speak 'Hello\.' with the voice slt \(no such voice\)"):
        synthesizers.speak("Hello.", SLT)


def test_hours_must_be_above_zero(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_base_corpus.main(["--output", str(tmp_path), "--hours", "0"])
    assert "--hours must be above 0" in capsys.readouterr().err


@needs_synthesizers
@needs_pyworld
def test_speakers_of_all_kinds_speak_and_two_of_them_differ():
    one_of_each_kind = {speaker.name.rsplit("-", 1)[0]: speaker for speaker in make_base_corpus.SPEAKERS}
    assert one_of_each_kind.keys() == {kind.name for kind in make_base_corpus.KINDS}
    clips = {name: synthesizers.speak("Where is the red table?", one) for name, one in one_of_each_kind.items()}
    assert all(0.8 < len(clip) / RATE < 4 for clip in clips.values())
    assert all(np.abs(clip).max() < 32767 for clip in clips.values())
    assert len({clip.tobytes() for clip in clips.values()}) == len(clips)


@needs_synthesizers
@needs_pyworld
def test_main_says_what_came_out(tmp_path, capsys):
    make_base_corpus.main(["--output", str(tmp_path / "corpus"), "--hours", "0.002"])
    assert "clips of" in capsys.readouterr().out
    assert (
        (tmp_path / "corpus" / "metadata.csv").read_text().startswith("audio_file|text|speaker\nwavs/base-00001.flac|")
    )
