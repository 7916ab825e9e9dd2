"""Training sees a speaker and a clip as TorToiSe's programs do when they speak, and the checks notice if it doesn't.

Another trainer has four habits that break this while everything still runs, and each is tried on the checks here: F1,
codes of the silence padded behind a clip as targets; F2, a conditioning encoder whose residual starts from its
normalised input; F3, a position per conditioning clip instead of their mean; F4, clips of 2 s instead of 6. What
speaking does is written out once more, from the recordings on, with nothing of the package but the mel front end.
"""

from __future__ import annotations

import copy

import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import golden_gpt, make_config
from speaking import all_clips_in_one_batch, first_position, training_batch

from tortoise_hf.audio import LogMel
from tortoise_hf.data.collate import IGNORE_INDEX
from tortoise_hf.models.conditioning import ConditioningAttention
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import load_mel_norms, resolve_base

CONDITIONING_SAMPLES = 132_300  # 6 s at 22 050 Hz


@pytest.fixture
def made(tiny_base, tiny_voice, tmp_path):
    """Makes the first batch of a run with the default data settings, or changed ones; gives it and the mel norms."""
    voice = tiny_voice(6)

    def make(**data):
        cfg = make_config(tmp_path, data__root=str(voice), data__cache_dir=str(tmp_path / "cache"),
                          model__base=str(tiny_base), model__from_scratch=True)  # fmt: skip
        files = resolve_base(cfg.model)
        found = training_batch(all_clips_in_one_batch(cfg, **data), files, golden_gpt().config, voice)
        assert len(found.clips) == 6
        return found, load_mel_norms(files)

    return make


def speaking_latent(model, clips, norms):
    """Conditioning vector as tortoise-tts computes it for finished clips: its encoder spelled out."""
    encoder, heads = model.conditioning_encoder, model.config.num_heads
    vectors = []
    for path in clips:
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == 22_050
        waveform = F.pad(torch.from_numpy(samples), (0, CONDITIONING_SAMPLES - len(samples)))
        hidden = encoder.init(LogMel(norms)(waveform))
        for block in encoder.attn:
            normed = F.group_norm(hidden, block.norm.num_groups, block.norm.weight, block.norm.bias, 1e-5)
            query, key, value = block.qkv(normed).view(heads, -1, hidden.shape[-1]).chunk(3, dim=1)
            scale = query.shape[1] ** -0.25
            weights = torch.einsum("hct,hcs->hts", query * scale, key * scale).softmax(-1)
            attended = torch.einsum("hts,hcs->hct", weights, value).reshape(hidden.shape)
            hidden = hidden + block.proj_out(attended)  # the un-normalised input is carried on
        vectors.append(hidden[0, :, 0])
    return torch.stack(vectors).mean(0)  # one vector however many clips


@torch.no_grad()
def check_conditioning(model, found, norms):
    batch = found.batch
    assert batch.conditioning_mel.shape[1:] == (2, 80, 517), "6 s of two clips"
    expected = torch.stack([speaking_latent(model, clips, norms) for clips in found.conditioning_clips])
    first, length = first_position(model, batch)
    # Cached mels are float16; without that the two agree to 1e-5.
    torch.testing.assert_close(first, expected, rtol=0, atol=0.02)
    assert length == (1 + batch.text_lengths + batch.mel_lengths).sum(), "one position for the speaker"
    for clip, conditioning_clips in zip(found.clips, found.conditioning_clips, strict=True):
        assert clip not in conditioning_clips


def check_targets(found, config):
    batch = found.batch
    for row, path in enumerate(found.clips):
        samples = soundfile.info(path).frames
        targets = batch.mel_targets[row]
        counted = targets[targets != IGNORE_INDEX]
        assert len(counted) == samples // 1024 + 2, "the clip's codes and one STOP, whatever the row is padded to"
        assert counted[-1] == config.stop_mel_id
        assert (counted[:-1] < config.num_mel_codes).all()


def test_training_conditions_and_ends_as_speaking_does(made):
    model = golden_gpt()
    found, norms = made()
    check_conditioning(model, found, norms)
    check_targets(found, model.config)


def test_f1_codes_of_the_silence_behind_a_clip_are_noticed(made):
    """The other trainer's lengths are 1024 times too long, so all codes of the padded recording become targets."""
    found, _ = made()
    config = golden_gpt().config
    check_targets(found, config)
    silence = torch.full((len(found.clips), 250), 7)
    for row, length in enumerate(found.batch.mel_lengths):
        silence[row, : length - 1] = found.batch.mel_targets[row, : length - 1]
    found.batch.mel_targets = F.pad(silence, (0, 1), value=config.stop_mel_id)
    with pytest.raises(AssertionError, match="the clip's codes and one STOP"):
        check_targets(found, config)


def test_f2_residual_from_the_normalised_input_is_noticed(made, monkeypatch):
    found, norms = made()

    def normalised(self, hidden, num_answers=None, row=None):
        found = ConditioningAttention.real_forward(self, hidden, num_answers, row)
        changed = self.norm(hidden, row) - hidden
        if row is not None and num_answers is not None:
            changed = torch.cat([part[:, :, :num_answers] for part in row.split(changed)])
        return found + changed[:, :, :num_answers]

    monkeypatch.setattr(ConditioningAttention, "real_forward", ConditioningAttention.forward, raising=False)
    monkeypatch.setattr(ConditioningAttention, "forward", normalised)
    with pytest.raises(AssertionError, match="not close"):
        check_conditioning(golden_gpt(), found, norms)


@pytest.mark.parametrize("instead", ["first clip", "sum"])
def test_f3_anything_but_the_mean_over_clips_is_noticed(made, monkeypatch, instead):
    found, norms = made()

    def encode(self, conditioning_mel):
        latents = torch.stack([self.conditioning_encoder(conditioning_mel[:, clip]) for clip in range(2)])
        return latents[0] if instead == "first clip" else latents.sum(0)

    monkeypatch.setattr(TortoiseGPT, "encode_conditioning", encode)
    with pytest.raises(AssertionError, match="not close"):
        check_conditioning(golden_gpt(), found, norms)


def test_f3_a_second_position_for_the_speaker_is_noticed(made):
    found, norms = made()
    model = golden_gpt()

    def insert(module, args, kwargs):
        row, packing = kwargs["inputs_embeds"], copy.copy(kwargs["packing"])
        *others, last = packing.row_lengths
        packing.row_lengths = (*others, last + 1)
        start = sum(others)
        row = torch.cat([row[:, : start + 1], row[:, start:]], dim=1)
        return args, {**kwargs, "inputs_embeds": row, "packing": packing}

    model.gpt.register_forward_pre_hook(insert, with_kwargs=True)
    model.gpt.register_forward_hook(lambda module, args, output: type(output)(output.last_hidden_state[:, 1:]))
    with pytest.raises(AssertionError, match="one position for the speaker"):
        check_conditioning(model, found, norms)


def test_f4_two_seconds_instead_of_six_are_noticed(made):
    found, norms = made(conditioning_seconds=2.0)
    with pytest.raises(AssertionError, match="6 s of two clips"):
        check_conditioning(golden_gpt(), found, norms)
