"""A voice from its files to sound, with a chain of tiny random models."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from chain_models import make_tiny_chain, make_tiny_voice
from conftest import SENTENCES
from safetensors.torch import save

from tortoise_hf.errors import UserError
from tortoise_hf.latents import VoiceLatents, load_latents, save_latents
from tortoise_hf.models.checkpoint_formats import published_state_dict, write_published
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.presets import PRESETS
from tortoise_hf.sound import PARAGRAPH_PAUSE, SENTENCE_PAUSE, write_speeches
from tortoise_hf.voice import Voice

QUICK = {"preset": "single_sample", "num_samples": 3, "steps": 3, "max_codes": 40}
LONG = "The kettle is on. A dog barked at noon. " * 12


@pytest.fixture(scope="session")
def chain_dir(tmp_path_factory):
    return make_tiny_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def voice_dir(tmp_path_factory):
    folder = make_tiny_voice(tmp_path_factory.mktemp("voices") / "tiny", SENTENCES)
    generator = torch.Generator().manual_seed(3)
    latents = VoiceLatents(torch.randn(1, 32, generator=generator), torch.randn(1, 64, generator=generator))
    save_latents(latents, folder / "latents.safetensors")
    return folder


@pytest.fixture(scope="session")
def voice(voice_dir, chain_dir):
    return Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu")


@pytest.fixture
def clips(tmp_path):
    """Recordings from short to longer than what is heard of one."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, seconds in enumerate((0.8, 5.0, 7.0)):
        soundfile.write(folder / f"{index}.wav", 0.2 * rng.standard_normal(int(22_050 * seconds)), 22_050)
    return folder


def test_speaks(voice, tmp_path):
    speech = voice.speak("The kettle is on.", **QUICK)
    assert speech.sample_rate == 24_000
    assert speech.waveform.dtype == torch.float32
    assert speech.seconds > 0.1
    assert speech.waveform.abs().max() <= 1
    assert speech.waveform.std() > 0
    speech.save(tmp_path / "new" / "speech.wav")
    read, rate = soundfile.read(tmp_path / "new" / "speech.wav")
    assert rate == 24_000
    np.testing.assert_allclose(read, speech.waveform.numpy(), atol=1 / 32_000)
    assert speech._repr_html_().startswith('<audio controls src="data:audio/wav;base64,UklGR')


def test_the_seed_decides(voice):
    first, second, other = (voice.speak("Rain fell.", seed=seed, **QUICK).waveform for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert len(first) != len(other) or not torch.equal(first, other)


def test_a_batch_is_its_texts(voice):
    texts = ["Rain fell.", LONG, "He said yes!"]
    together = voice.speak(texts, **QUICK)
    assert [speech.text for speech in together] == texts
    for speech, text in zip(together, texts, strict=True):
        assert torch.equal(speech.waveform, voice.speak(text, **QUICK).waveform)


def test_several_results(voice):
    text = "The kettle is on.\n\nHe said yes!"
    best, second = voice.speak(text, num_results=2, **QUICK)
    assert torch.equal(best.waveform, voice.speak(text, **QUICK).waveform)
    assert len(best.waveform) != len(second.waveform) or not torch.equal(best.waveform, second.waveform)
    assert best.text == second.text == text
    every = voice.speak(["Rain fell.", text], num_results=3, **QUICK)
    assert [len(ways) for ways in every] == [3, 3]
    assert torch.equal(every[1][1].waveform, second.waveform)
    with pytest.raises(UserError, match="between 1 and the number of samples, 3, got 4"):
        voice.speak("Rain fell.", num_results=4, **QUICK)
    with pytest.raises(UserError, match="A preview is made of one sample"):
        voice.speak("Rain fell.", num_results=2, preview=True)


def mapped(model, path):
    """Share of a model's bytes that lie in the file as it is mapped into memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    weights = [weight for weight in model.state_dict().values() if weight.numel() > 1000]
    inside = [any(start <= weight.data_ptr() < end for start, end in ranges) for weight in weights]
    return sum(weight.nbytes for weight, there in zip(weights, inside, strict=True) if there) / sum(
        weight.nbytes for weight in weights
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system doesn't tell what is mapped")
def test_weights_are_not_copied_from_their_files(voice_dir, chain_dir):
    """Which is what keeps the released models below 4 GiB, see benchmarks/RESULTS.md."""
    shelf = Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu").chain.shelf
    files = {"gpt": voice_dir, "clvp": chain_dir / "clvp", "diffusion": chain_dir / "diffusion"}
    for name, folder in files.items():
        with shelf.use(name) as model:
            assert mapped(model, folder / "model.safetensors") > 0.99, name


def test_low_memory_says_the_same_and_loads_each_model_once_per_stage(voice, voice_dir, chain_dir, monkeypatch):
    frugal = Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu", low_memory=True)
    shelf, loaded = frugal.chain.shelf, []
    loaders = {
        name: lambda name=name, load=load: (loaded.append(name), load())[1] for name, load in shelf._loaders.items()
    }
    monkeypatch.setattr(shelf, "_loaders", loaders)
    assert not shelf._models
    assert torch.equal(frugal.speak(LONG, **QUICK).waveform, voice.speak(LONG, **QUICK).waveform)
    assert len(frugal.pieces(LONG)) > 1
    assert loaded == ["gpt", "clvp", "gpt", "diffusion", "vocoder"]
    assert not shelf._models


def test_half_precision_speaks(voice_dir, chain_dir):
    half = Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu", dtype=torch.bfloat16)
    speech = half.speak("The kettle is on.", **QUICK)
    assert speech.seconds > 0.1
    assert speech.waveform.isfinite().all()


def test_long_text_is_streamed_piece_by_piece(voice, tmp_path):
    text = LONG + "\n\nHe said yes!"
    pieces = voice.pieces(text)
    assert len(pieces) >= 3
    streamed = list(voice.stream(text, **QUICK))
    assert [speech.text for speech in streamed] == [piece.text for piece in pieces]
    whole = voice.speak(text, **QUICK)
    assert torch.equal(torch.cat([speech.waveform for speech in streamed]), whole.waveform)
    alone = [voice.speak(piece.text, **QUICK) for piece in pieces]
    pauses = [len(a.waveform) - len(b.waveform) for a, b in zip(streamed, alone, strict=True)]
    assert pauses == [int(24_000 * SENTENCE_PAUSE)] * (len(pieces) - 2) + [int(24_000 * PARAGRAPH_PAUSE), 0]

    seconds = write_speeches(iter(streamed), tmp_path / "stream.flac")
    assert seconds == pytest.approx(whole.seconds)
    read, _ = soundfile.read(tmp_path / "stream.flac")
    np.testing.assert_allclose(read, whole.waveform.numpy(), atol=1 / 32_000)
    pipe = io.BytesIO()
    write_speeches(iter(streamed), pipe)
    samples = np.frombuffer(pipe.getvalue()[44:], dtype="<i2")
    assert pipe.getvalue()[:4] == b"RIFF"
    assert len(samples) == len(whole.waveform)
    np.testing.assert_allclose(samples / 32_767, whole.waveform.numpy(), atol=1 / 32_000)


def test_a_cut_off_row_is_told(voice, monkeypatch):
    said = []
    # Asked at its source: a program run earlier in this process may have switched loggers off.
    monkeypatch.setattr("tortoise_hf.speech.logger.warning", lambda message, *values: said.append(message % values))
    voice.speak("The kettle is on.", **{**QUICK, "max_codes": 4})
    assert any("may be cut off" in line for line in said)


def test_progress_counts_samples_and_steps(voice):
    counts = {}
    voice.speak(LONG, progress=lambda stage, done: counts.update({stage: counts.get(stage, 0) + done}), **QUICK)
    pieces = len(voice.pieces(LONG))
    assert counts == {"codes": 3 * pieces, "diffusion": 3 * pieces}


def test_preview_needs_nothing_but_the_voice(voice_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    voice = Voice.from_pretrained(voice_dir, device="cpu", preview=True)
    speech = voice.speak("The kettle is on.", preview=True, max_codes=40)
    assert speech.sample_rate == 22_050
    assert 0 < speech.seconds <= 40 * 1024 / 22_050 + 0.1
    assert speech.waveform.isfinite().all()
    again = voice.speak("The kettle is on.", preview=True, max_codes=40)
    assert torch.equal(again.waveform, speech.waveform)


def test_preview_of_the_demo(tmp_path, repository, chain_dir):
    """The demo's base has codes of its own: it is heard as a preview and refused by the chain."""
    clips = sorted((repository / "examples" / "demo_voice" / "wavs").iterdir())[:2]
    voice = Voice.from_pretrained(repository / "examples" / "demo_base", clips=clips, preview=True, device="cpu")
    assert voice.speak("The kettle is on.", preview=True, max_codes=20).seconds > 0.5
    for_the_chain = Voice.from_pretrained(
        repository / "examples" / "demo_base",
        weights_dir=chain_dir,
        latents=_both_latents(tmp_path, voice),
        device="cpu",
    )
    with pytest.raises(UserError, match="512 codes"):
        for_the_chain.speak("Hello.", **QUICK)


def _both_latents(folder, voice):
    save_latents(VoiceLatents(voice.latents.gpt, torch.zeros(1, 64)), folder / "both.safetensors")
    return folder / "both.safetensors"


def test_speaker_from_clips_is_stored_and_read(voice_dir, chain_dir, clips, tmp_path):
    heard = Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu", clips=clips)
    assert heard.latents.gpt.shape == (1, 32)
    assert heard.latents.diffusion.shape == (1, 64)
    for name in ("speaker.safetensors", "speaker.pth"):
        heard.save_latents(tmp_path / name)
        read = load_latents(tmp_path / name)
        assert torch.equal(read.gpt, heard.latents.gpt)
        assert torch.equal(read.diffusion, heard.latents.diffusion)
    pair = torch.load(tmp_path / "speaker.pth", weights_only=True)  # what tortoise-tts unpacks
    assert [tuple(latent.shape) for latent in pair] == [(1, 32), (1, 64)]
    # A folder with clips needs no latents.
    folder = tmp_path / "with_clips"
    shutil.copytree(voice_dir, folder)
    (folder / "latents.safetensors").unlink()
    shutil.copytree(clips, folder / "conditioning")
    again = Voice.from_pretrained(folder, weights_dir=chain_dir, device="cpu")
    assert torch.equal(again.latents.gpt, heard.latents.gpt)


def test_voices_are_averaged_and_drawn(voice_dir, chain_dir, tmp_path):
    def latents(**speaker):
        return Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu", **speaker).latents

    first, second = latents(random=1), latents(random=2)
    assert not torch.equal(first.gpt, second.gpt)
    assert torch.equal(latents(random=1).diffusion, first.diffusion)
    save_latents(first, tmp_path / "first.pth")
    save_latents(second, tmp_path / "second.safetensors")
    mean = latents(latents=[tmp_path / "first.pth", tmp_path / "second.safetensors"])
    torch.testing.assert_close(mean.gpt, (first.gpt + second.gpt) / 2)
    torch.testing.assert_close(mean.diffusion, (first.diffusion + second.diffusion) / 2)


def test_published_file_is_a_voice(voice, voice_dir, chain_dir, tmp_path):
    """What tortoise-tts-fast takes as --ar-checkpoint, beside a config because the model is so small."""
    for name in ("config.json", "tokenizer.json", "mel_norms.safetensors"):
        shutil.copy(voice_dir / name, tmp_path)
    gpt = TortoiseGPT.from_pretrained(voice_dir)
    write_published(published_state_dict(gpt.state_dict(), gpt.config), tmp_path / "7_gpt.pth")
    speaker = voice_dir / "latents.safetensors"
    same = Voice.from_pretrained(tmp_path / "7_gpt.pth", latents=speaker, weights_dir=chain_dir, device="cpu")
    assert torch.equal(same.speak("Rain fell.", **QUICK).waveform, voice.speak("Rain fell.", **QUICK).waveform)


def test_a_run_stands_for_its_export(voice, voice_dir, chain_dir, tmp_path):
    shutil.copytree(voice_dir, tmp_path / "run" / "export")
    (tmp_path / "run" / "export" / "latents.safetensors").rename(tmp_path / "run" / "latents.safetensors")
    same = Voice.from_pretrained(tmp_path / "run", weights_dir=chain_dir, device="cpu")
    assert torch.equal(same.latents.gpt, voice.latents.gpt)


def test_a_voice_on_the_hub(hub, voice_dir):
    """Any revision of it, checked as `pull_voice` does."""
    files = {path.relative_to(voice_dir).as_posix(): path.read_bytes() for path in voice_dir.rglob("*.*")}
    norms = {"mel_norms.safetensors": save({"mel_norms": torch.full((80,), -2.0)})}
    first, _ = (hub.repository("me/voice").commit(content) for content in (files, files | norms))

    def norm(name, **options):
        voice = Voice.from_pretrained(
            name, latents=voice_dir / "latents.safetensors", preview=True, device="cpu", **options
        )
        return float(voice.chain.mel_norms[0])

    assert norm("me/voice") == -2
    assert norm("me/voice", revision=first) == -4
    assert norm(f"me/voice@{first}") == -4
    with pytest.raises(UserError, match="second-try"):
        norm("me/voice", revision="second-try")
    with pytest.raises(UserError, match="of a voice on the Hub"):
        norm(voice_dir, revision=first)
    hub.repository("me/voice").commit(files | {"model.safetensors": files["model.safetensors"][:-8]})
    with pytest.raises(UserError, match=r"me/voice/model\.safetensors"):
        norm("me/voice")


@pytest.mark.parametrize("text", ["", "  \n ", "?!... --", "🙂🙂", "“”"])
def test_nothing_to_say_is_said(voice, text):
    with pytest.raises(UserError, match="nothing to say"):
        voice.speak(text, **QUICK)


def test_odd_texts_are_spoken(voice):
    assert voice.speak("🙂 Hello?! 🙂", **QUICK).seconds > 0.05
    assert voice.speak("[sad] 100% of $3.50 & more", **QUICK).seconds > 0.05
    assert len(voice.pieces("One.\n\n...\n\nTwo.")) == 2


def test_a_word_of_a_thousand_tokens_is_spoken(voice):
    pieces = voice.pieces("qzx" * 400)
    assert len(pieces) > 2
    most = voice.chain.gpt_config.max_text_tokens
    assert all(len(voice.chain.text_ids(piece.text)) <= most for piece in pieces)
    digits = voice.pieces("9" * 290)  # one word of 290 characters, far more ids once it is written out
    assert all(len(voice.chain.text_ids(piece.text)) <= most for piece in digits)
    assert len(digits) > 1
    assert voice.speak("9" * 290, **{**QUICK, "num_samples": 1, "max_codes": 10}).seconds > 0


def test_unknown_preset_and_wrong_numbers(voice):
    with pytest.raises(UserError, match=r"fastest.*single_sample, ultra_fast"):
        voice.speak("Hello.", preset="fastest")
    with pytest.raises(UserError, match="at least 2, got 1"):
        voice.speak("Hello.", steps=1)
    with pytest.raises(UserError, match="temperature must be at least 0"):
        voice.speak("Hello.", temperature=-1)
    assert set(PRESETS) == {"single_sample", "ultra_fast", "very_fast", "fast", "standard", "high_quality"}


def test_voice_that_is_not_there(tmp_path, chain_dir):
    with pytest.raises(UserError, match="neither a folder"):
        Voice.from_pretrained(tmp_path / "nobody", weights_dir=chain_dir)
    with pytest.raises(UserError, match="can't be used here"):
        Voice.from_pretrained(tmp_path, device="warp9")
    with pytest.raises(UserError, match=r"holds no GPT .* give an export's folder"):
        Voice.from_pretrained(tmp_path, weights_dir=chain_dir)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="a run that isn't exported yet"):
        Voice.from_pretrained(tmp_path, weights_dir=chain_dir)


def test_folder_with_a_missing_file(voice_dir, chain_dir, tmp_path):
    folder = tmp_path / "voice"
    shutil.copytree(voice_dir, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        Voice.from_pretrained(folder, weights_dir=chain_dir, device="cpu")
    shutil.copy(voice_dir / "model.safetensors", folder)
    (folder / "latents.safetensors").unlink()
    with pytest.raises(UserError, match="doesn't say who speaks"):
        Voice.from_pretrained(folder, weights_dir=chain_dir, device="cpu")


def test_chain_with_a_damaged_model(voice_dir, chain_dir, tmp_path):
    shutil.copytree(chain_dir, tmp_path / "chain")
    (tmp_path / "chain" / "clvp" / "model.safetensors").write_bytes(b"no weights")
    voice = Voice.from_pretrained(voice_dir, weights_dir=tmp_path / "chain", device="cpu")
    with pytest.raises(UserError, match="clvp"):
        voice.speak("Hello.", **QUICK)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "damaged"),
        (b"garbage", "damaged"),
        ({"a": 1}, "holds dict"),
        ((torch.zeros(1, 32),), "1 entries"),
        ((torch.zeros(3, 32), torch.zeros(1, 64)), "expected a voice"),
        ((torch.full((1, 32), torch.nan), torch.zeros(1, 64)), "NaN"),
        ((torch.zeros(1, 48), torch.zeros(1, 64)), "belong to another"),
    ],
)
def test_corrupt_latents(voice_dir, chain_dir, tmp_path, content, message):
    path = tmp_path / "latents.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        Voice.from_pretrained(voice_dir, weights_dir=chain_dir, device="cpu", latents=path)


def test_corrupt_latents_of_our_own(voice_dir, chain_dir, tmp_path):
    folder = tmp_path / "voice"
    shutil.copytree(voice_dir, folder)
    data = (folder / "latents.safetensors").read_bytes()
    (folder / "latents.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"latents\.safetensors is damaged"):
        Voice.from_pretrained(folder, weights_dir=chain_dir, device="cpu")


def test_preview_latents_do_not_speak(voice_dir, chain_dir, tmp_path):
    save_latents(VoiceLatents(torch.zeros(1, 32), None), tmp_path / "latents.safetensors")
    voice = Voice.from_pretrained(
        voice_dir, weights_dir=chain_dir, device="cpu", latents=tmp_path / "latents.safetensors"
    )
    with pytest.raises(UserError, match="only previews"):
        voice.speak("Hello.", **QUICK)
    with pytest.raises(UserError, match="needs both"):
        voice.save_latents(tmp_path / "for_tortoise.pth")
