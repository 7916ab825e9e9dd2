"""scripts/speak.py and scripts/voice.py: from arguments to files."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import soundfile
import torch
from chain_models import make_tiny_chain, make_tiny_voice
from conftest import REPOSITORY, SENTENCES


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a voice, recordings and the chain."""
    folder = tmp_path_factory.mktemp("speak")
    make_tiny_chain(folder / "chain")
    make_tiny_voice(folder / "voice", SENTENCES)
    (folder / "clips").mkdir()
    noise = 0.2 * np.random.default_rng(0).standard_normal(22_050 * 2)
    soundfile.write(folder / "clips" / "one.wav", noise, 22_050)
    return folder


@pytest.fixture
def speak(places):
    """Calls speak.py on the tiny voice, quickly."""

    def call(*arguments):
        quick = ["--preset", "single_sample", "--num_samples", "2", "--steps", "2", "--max_codes", "20"]
        where = ["--voice", places / "voice", "--weights_dir", places / "chain", "--device", "cpu"]
        script("speak")([str(argument) for argument in (*quick, *where, *arguments)])

    return call


def test_speaks_with_clips_into_a_file(speak, places, tmp_path, capsys):
    speak("Hello there.", "--clips", places / "clips", "--out", tmp_path / "hello.wav")
    waveform, rate = soundfile.read(tmp_path / "hello.wav")
    assert rate == 24_000
    assert waveform.std() > 0
    assert "s of speech in" in capsys.readouterr().err


def test_stored_speaker_stream_file_and_standard_input(speak, places, tmp_path, monkeypatch):
    stored = tmp_path / "speaker.pth"
    where = ["--voice", str(places / "voice"), "--weights_dir", str(places / "chain"), "--device", "cpu"]
    script("voice")([*where, "--clips", str(places / "clips" / "one.wav"), "--out", str(stored)])
    assert [tuple(latent.shape) for latent in torch.load(stored, weights_only=True)] == [(1, 32), (1, 64)]

    text = "The kettle is on.\n\nA dog barked at noon."
    (tmp_path / "text.txt").write_text(text)
    who = ("--latents", stored)
    speak("--file", tmp_path / "text.txt", *who, "--out", tmp_path / "whole.wav")
    speak(text, *who, "--stream", "--out", tmp_path / "stream.wav")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    speak("-", *who, "--low_memory", "--out", tmp_path / "stdin.wav")
    whole = (tmp_path / "whole.wav").read_bytes()
    assert (tmp_path / "stream.wav").read_bytes() == whole
    assert (tmp_path / "stdin.wav").read_bytes() == whole


def test_sound_on_standard_output(speak, places, capfdbinary):
    speak("Hello there.", "--random", "4", "--out", "-")
    data = capfdbinary.readouterr().out
    assert data[:4] == b"RIFF"
    samples, rate = soundfile.read(io.BytesIO(data))
    assert rate == 24_000
    assert len(samples) > 1000


def test_preview(places, tmp_path):
    script("speak")(
        [
            *("Hello.", "--voice", str(places / "voice"), "--clips", str(places / "clips"), "--preview"),
            *("--out", str(tmp_path / "preview.wav"), "--device", "cpu", "--max_codes", "20"),
        ]
    )
    assert soundfile.info(tmp_path / "preview.wav").samplerate == 22_050


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("",), "nothing to say"),
        (("Hello.", "--preset", "best"), "no preset 'best'"),
        (("Hello.",), "doesn't say who speaks"),
        (("Hello.", "--latents", "nowhere.pth"), "no such file"),
        (("Hello.", "--clips", "nowhere"), "is not there"),
        (("Hello.", "--random", "1", "--out", "speech.xyz"), "name a .wav, .flac, .mp3 or .ogg file"),
        (("Hello.", "--random", "1", "--out", "speech.xyz", "--stream"), "name a .wav, .flac, .mp3 or .ogg file"),
        (("Hello.", "--file", "x.txt"), "not both"),
    ],
)
def test_mistakes_are_sentences(speak, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if arguments == ("",):
        arguments = ("", "--random", "1")
    with pytest.raises(SystemExit) as stop:
        speak(*arguments)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_answers(capsys):
    for name in ("speak", "voice"):
        with pytest.raises(SystemExit) as stop:
            script(name)(["--help"])
        assert stop.value.code == 0
        assert "--latents" in capsys.readouterr().out
