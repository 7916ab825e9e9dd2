"""The speaker measures on voices made of noise and tones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tortoise_hf.audio import SAMPLE_RATE, LogMel
from tortoise_hf.errors import UserError
from tortoise_hf.evaluation.speaker_similarity import SpeakerJudge, SpectralMeasure, cepstral_statistics, load_measure
from tortoise_hf.evaluation.speaking import Utterance

CPU = torch.device("cpu")
VOICES = {"low": (110.0, 0.6), "high": (220.0, 0.6), "dark": (110.0, 0.9)}
"""Pitch in Hz, and how much of each harmonic's loudness the next one keeps."""


def utterance(pitch, damping, rng):
    """0.7 s of a hum whose pitch and loudness move, with some noise."""
    time = np.arange(int(0.7 * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * pitch * np.cumsum(1 + 0.05 * np.sin(2 * np.pi * rng.uniform(2, 4) * time)) / SAMPLE_RATE
    hum = sum(damping**number * np.sin(number * phase) for number in range(1, 25))
    waveform = 0.1 * hum * (0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(3, 6) * time))
    waveform = torch.from_numpy(waveform + 0.002 * rng.standard_normal(len(time))).float()
    return Utterance("", torch.zeros(0), True, LogMel()(waveform)[0], waveform, SAMPLE_RATE)


@pytest.fixture(scope="module")
def voices():
    rng = np.random.default_rng(0)
    return {name: [utterance(*sound, rng) for _ in range(8)] for name, sound in VOICES.items()}


def judge(measure, voices):
    learnt = {name: clips[:5] for name, clips in voices.items()}
    return SpeakerJudge(measure, "low", learnt, {name: clips[5:] for name, clips in voices.items()})


def test_voices_are_told_apart(voices):
    found = judge(SpectralMeasure(), voices)
    assert found.accuracy == 1
    assert found.num_unseen == 9
    assert set(found.others) == {"high", "dark"}
    assert max(found.others.values()) < 0.6
    own = found.judge(voices["low"][5:])
    assert own.similarity == pytest.approx(1)  # what it is measured by
    assert own.nearest_is_target == 1
    other = found.judge(voices["high"])
    assert other.similarity < 0.6
    assert other.nearest_is_target == 0
    assert set(other.nearest) == {"high"}
    assert len(other.each) == 8
    mixed = found.judge([*voices["low"][5:7], *voices["dark"][:2]])
    assert mixed.nearest_is_target == 0.5


def test_mixed_up_voices_are_found_out(voices):
    """The accuracy isn't there by construction."""
    clips = [clip for each in voices.values() for clip in each]
    found = judge(SpectralMeasure(), {"low": clips[::3], "high": clips[1::3], "dark": clips[2::3]})
    assert found.accuracy < 0.8


def test_a_single_voice(voices):
    found = judge(SpectralMeasure(), {"low": voices["low"]})
    assert found.accuracy is None
    own, other = found.judge(voices["low"][5:]), found.judge(voices["high"])
    assert own.similarity == pytest.approx(1)
    assert own.nearest_is_target is None
    assert other.similarity < 0.5


def test_loudness_and_silence_change_nothing(voices):
    log_mel = voices["low"][0].log_mel
    vector = cepstral_statistics(log_mel)
    np.testing.assert_allclose(cepstral_statistics(log_mel - 3), vector, atol=1e-6)
    silent = torch.cat([torch.full((80, 30), -11.5), log_mel, torch.full((80, 9), -11.5)], dim=1)
    np.testing.assert_allclose(cepstral_statistics(silent), vector, atol=1e-6)


def test_a_speaker_model_of_transformers(voices, tmp_path):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 8), conv_stride=(10, 8), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=1,
        tdnn_dim=(8, 8), tdnn_kernel=(5, 1), tdnn_dilation=(1, 1), xvector_output_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        WavLMForXVector(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    measure = load_measure(str(tmp_path), CPU)
    vectors = measure.embed(voices["low"])
    assert vectors.shape == (8, 12)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    found = judge(measure, voices)
    means = vectors[:5].mean(0)
    cosines = vectors[5:] @ means / np.linalg.norm(means)
    assert found.judge(voices["low"][5:]).each == pytest.approx(tuple(cosines), abs=1e-5)


def test_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"me/nothing can't be loaded .* --speaker_measure spectral"):
        load_measure("me/nothing", CPU)
