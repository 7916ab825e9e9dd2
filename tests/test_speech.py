"""The chain's own parts: what Griffin-Lim gives back, how many rows go together, which memory is let go."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import REPOSITORY

from tortoise_hf.audio import LogMel, load_waveform
from tortoise_hf.errors import UserError
from tortoise_hf.latents import VoiceLatents
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.presets import PRESETS, choose_preset
from tortoise_hf.speech import Chain, ModelShelf, griffin_lim, rows_at_once


def test_griffin_lim_gives_the_mel_back():
    """A recording's mel, made a waveform and heard again, is nearly the same mel."""
    clip = sorted((REPOSITORY / "examples" / "demo_voice" / "wavs").iterdir())[0]
    log_mel = LogMel()
    mel = log_mel(load_waveform(clip)[:40_000])[0]
    waveform = griffin_lim(mel)
    assert waveform.abs().max() <= 1
    assert abs(len(waveform) - 40_000) < 512
    again = log_mel(waveform)[0]
    frames = min(mel.shape[1], again.shape[1])
    audible = mel[:, :frames] > mel.max() - 7  # 30 dB
    error = (again[:, :frames] - mel[:, :frames]).abs()[audible].mean()
    shuffled = (again[:, :frames].flip(1) - mel[:, :frames]).abs()[audible].mean()
    assert error < 0.35
    assert error < 0.3 * shuffled
    assert torch.equal(griffin_lim(mel), waveform)


def test_presets_and_changes():
    assert choose_preset("standard").num_samples == 256
    assert choose_preset("standard").diffusion.steps == 200
    changed = choose_preset("fast", num_samples=5, steps=7, sampler="ddim", temperature=0.2, max_codes=90)
    assert (changed.num_samples, changed.diffusion.steps, changed.diffusion.sampler) == (5, 7, "ddim")
    assert (changed.sampling.temperature, changed.sampling.max_codes, changed.sampling.top_k) == (0.2, 90, 50)
    assert PRESETS["ultra_fast"].diffusion.guidance == 0
    with pytest.raises(UserError, match="number of samples must be at least 1, got 0"):
        choose_preset("fast", num_samples=0)
    with pytest.raises(UserError, match="ancestral, ddim, dpm"):
        choose_preset("fast", sampler="euler")


def test_rows_that_fit(monkeypatch):
    cpu = ModelShelf({}, torch.device("cpu"))
    assert rows_at_once(GPTConfig(), 600, torch.float32, cpu) == 16
    assert rows_at_once(GPTConfig(), 600, torch.float32, ModelShelf({}, torch.device("cpu"), low_memory=True)) == 4
    gpu = ModelShelf({}, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    many = rows_at_once(GPTConfig(), 600, torch.bfloat16, gpu)
    assert many == int(10**10 / (1 + 1 / 30) / (2 * 30 * 1024 * 600 * 2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 24 * 10**9))
    assert rows_at_once(GPTConfig(), 600, torch.bfloat16, gpu) == 1


def test_shelf_loads_once_or_lets_go():
    loaded = []

    def load():
        loaded.append(1)
        return torch.nn.Linear(2, 2)

    for low_memory, loads in ((False, 1), (True, 2)):
        loaded.clear()
        shelf = ModelShelf({"gpt": load}, torch.device("cpu"), torch.bfloat16, low_memory)
        for _ in range(2):
            with shelf.use("gpt") as model:
                assert model.weight.dtype == torch.bfloat16
                assert not model.training
        assert len(loaded) == loads


def test_a_gpt_of_another_codebook_is_refused_for_the_chain():
    shelf = ModelShelf({}, torch.device("cpu"))
    chain = Chain(shelf, GPTConfig(num_mel_codes=128), None, None)
    latents = VoiceLatents(torch.zeros(1, 1024), torch.zeros(1, 2048))
    with pytest.raises(UserError, match=r"128 codes.*only a preview"):
        chain.speak(["Hello."], latents, PRESETS["fast"], 0)
    with pytest.raises(UserError, match="only previews"):
        chain.speak(["Hello."], dataclasses.replace(latents, diffusion=None), PRESETS["fast"], 0)
