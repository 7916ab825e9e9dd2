"""scripts/speak.py and scripts/voice.py: from arguments to files."""

from __future__ import annotations

import importlib.util
import io
import shutil

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


def test_several_results_in_files(speak, tmp_path, capsys):
    speak("Hello there.", "--random", "4", "--num_results", "2", "--out", tmp_path / "hello.wav")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hello-1.wav", "hello-2.wav"]
    speak("Hello there.", "--random", "4", "--out", tmp_path / "best.wav")
    assert (tmp_path / "best.wav").read_bytes() == (tmp_path / "hello-1.wav").read_bytes()
    assert "hello-2.wav" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("qzx" * 300, 0.7),  # one word of more than 400 ids: several pieces
        ("🙂 Hello?! 🙂", 0.05),
        ("The kettle is on, and nobody has noticed it yet. " * 205, 10),  # 10,045 characters
    ],
)
def test_odd_texts_are_spoken(speak, tmp_path, text, seconds):
    speak(text, "--random", "1", "--num_samples", "1", "--max_codes", "5", "--out", tmp_path / "odd.wav")
    assert soundfile.info(tmp_path / "odd.wav").duration > seconds


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("",), "nothing to say"),
        ((" ?! ... --",), "has no letters or digits"),
        (("🙂🙂",), "has no letters or digits"),
        (("Hello.", "--preset", "best"), "no preset 'best'"),
        (("Hello.",), "doesn't say who speaks"),
        (("Hello.", "--latents", "nowhere.pth"), "no such file"),
        (("Hello.", "--latents", "broken.pth"), "broken.pth is damaged"),
        (("Hello.", "--latents", "broken.safetensors"), "broken.safetensors is damaged"),
        (("Hello.", "--clips", "nowhere"), "is not there"),
        (("Hello.", "--voice", "nobody"), "neither a folder, a weights file, nor a user/name on the Hub"),
        (("Hello.", "--random", "1", "--out", "speech.xyz"), "name a .wav, .flac, .mp3 or .ogg file"),
        (("Hello.", "--random", "1", "--out", "speech.xyz", "--stream"), "name a .wav, .flac, .mp3 or .ogg file"),
        (("Hello.", "--file", "x.txt"), "not both"),
        (("--file", "x.txt"), "x.txt can't be read"),
        (("Hello.", "--random", "1", "--num_results", "3"), "the number of samples, 2, got 3"),
        (("Hello.", "--random", "1", "--num_results", "2", "--stream"), "can't be streamed"),
    ],
)
def test_mistakes_are_sentences(speak, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no latents")
    if message in ("nothing to say", "has no letters or digits"):
        arguments = (*arguments, "--random", "1")
    assert_refused(lambda: speak(*arguments), message, capsys)


@pytest.mark.parametrize(
    "name, message",
    [
        ("config.json", "its config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("mel_norms.safetensors", "mel_norms.pth"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_voice_without_one_of_its_files(speak, places, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(places / "voice", tmp_path / "voice")
    (tmp_path / "voice" / name).unlink()
    assert_refused(lambda: speak("Hello.", "--random", "1", "--voice", tmp_path / "voice"), message, capsys)


def assert_refused(call, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
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
