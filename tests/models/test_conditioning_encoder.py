"""The conditioning encoder: TorToiSe's formula, and silence behind clips computed once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tortoise_hf.models.conditioning import ClipRow, ConditioningAttention, ConditioningEncoder, num_norm_groups


class TestConditioningAttention:
    def test_answers_for_the_first_frames_are_those_of_all(self):
        torch.manual_seed(0)
        block = ConditioningAttention(64, 4)
        hidden = torch.randn(2, 64, 11)
        torch.testing.assert_close(block(hidden, num_answers=3), block(hidden)[:, :, :3], atol=1e-6, rtol=0)

    def test_equals_the_formula_spelled_out(self):
        """Heads first, then query, key, value; scale head ** -0.25 on both; softmax over frames."""
        torch.manual_seed(0)
        channels, heads, frames = 64, 4, 11
        block = ConditioningAttention(channels, heads)
        hidden = torch.randn(2, channels, frames)
        qkv = block.qkv(block.norm(hidden)).reshape(2 * heads, 3 * channels // heads, frames)
        query, key, value = qkv.split(channels // heads, dim=1)
        scale = (channels // heads) ** -0.25
        weights = torch.softmax(torch.einsum("bct,bcs->bts", query * scale, key * scale), dim=-1)
        attended = torch.einsum("bts,bcs->bct", weights, value).reshape(2, channels, frames)
        torch.testing.assert_close(block(hidden), hidden + block.proj_out(attended), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("channels, groups", [(16, 8), (48, 16), (64, 16), (240, 16), (512, 32), (1024, 32)])
    def test_norm_groups(self, channels, groups):
        assert num_norm_groups(channels) == groups

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_group_norm_is_float32(self, dtype, monkeypatch):
        norm = ConditioningAttention(64, 4).norm.to(dtype)
        group_norm, seen = nn.functional.group_norm, []

        def watched(hidden, groups, weight, bias, eps):
            seen.append((hidden.dtype, weight.dtype, bias.dtype, eps))
            return group_norm(hidden, groups, weight, bias, eps)

        monkeypatch.setattr(nn.functional, "group_norm", watched)
        hidden = (1000 + 300 * torch.randn(1, 64, 50)).to(dtype)
        output = norm(hidden)
        assert (output.dtype, seen) == (dtype, [(*[torch.float32] * 3, 1e-5)])
        torch.testing.assert_close(output.double(), group_norm(hidden.double(), 16), atol=0.02, rtol=0.02)


FRAMES = 60
LENGTHS = {
    "unequal": [12, 45, 30],
    "one without silence": [60, 20],
    "one frame, and nothing but silence": [1, 0, 33],
}


def make_encoder() -> ConditioningEncoder:
    torch.manual_seed(0)
    encoder = ConditioningEncoder(80, 64, 4, 3)
    for parameter in encoder.parameters():  # fresh biases and projections would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return encoder


def make_clips(lengths: list[int]) -> torch.Tensor:
    """Noise with the same silent frame behind it."""
    mel = torch.randn(len(lengths), 80, FRAMES, generator=torch.Generator().manual_seed(1))
    for clip, length in zip(mel, lengths, strict=True):
        clip[:, length:] = torch.linspace(-2, 1, 80)[:, None]
    return mel


def passed(encoder: ConditioningEncoder, mel: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Vectors, and the gradients of a weighted sum of them."""
    encoder.zero_grad()
    vectors = encoder(mel)
    (vectors * torch.arange(vectors.numel()).view_as(vectors).sin()).sum().backward()
    return vectors.detach(), {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


@pytest.fixture
def whole_windows(monkeypatch):
    """Computes everything behind clips as often as it is there."""

    def switch() -> None:
        monkeypatch.setattr(ClipRow, "find", classmethod(lambda cls, mel: None))

    return switch


class TestSilenceBehindClips:
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("kind", LENGTHS)
    def test_counts_as_often_as_it_is_there(self, kind, checkpointing, whole_windows):
        encoder, mel = make_encoder(), make_clips(LENGTHS[kind])
        for block in encoder.attn:
            block.gradient_checkpointing = checkpointing
            block._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False
            )
        found = passed(encoder.train(), mel)
        whole_windows()
        expected = passed(encoder, mel)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        for name, value in expected[1].items():
            assert (found[1][name] - value).norm() <= 1e-4 * value.norm().clamp(min=1e-2), name

    @pytest.mark.parametrize("where", ["attention", "norms"])
    def test_counted_once_it_would_be_another_vector(self, where, monkeypatch):
        encoder, mel = make_encoder(), make_clips([12, 45, 30])
        real, find = encoder(mel), ClipRow.find

        def once(mel: torch.Tensor) -> ClipRow:
            row = find(mel)
            if where == "attention":
                return dataclasses.replace(row, repeats=[1] * len(mel))
            return dataclasses.replace(row, counts=torch.ones_like(row.counts))

        monkeypatch.setattr(ClipRow, "find", once)
        assert (encoder(mel) - real).abs().max() > 0.01

    def test_an_adapter_that_drops_frames_sees_all_of_them(self):
        encoder, seen, mel = make_encoder(), [], make_clips([12, 45])
        adapted = get_peft_model(encoder, LoraConfig(r=2, target_modules=["qkv"], lora_dropout=0.1))
        block = adapted.base_model.model.attn[1]
        block.proj_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        adapted.train()(mel)
        adapted.eval()(mel)
        assert seen == [(2, 64, FRAMES), (1, 64, 13 + 46)]

    def test_is_computed_once(self):
        encoder, seen = make_encoder(), []
        encoder.attn[1].qkv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        encoder(make_clips([12, 45, 30]))
        assert seen == [(1, 64, 13 + 46 + 31)]

    def test_clips_that_fill_their_windows_stay_side_by_side(self):
        encoder, seen = make_encoder(), []
        encoder.attn[1].qkv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        encoder(make_clips([60, 60]))
        with torch.autocast("cpu", torch.bfloat16):
            encoder(make_clips([12, 45]))
        encoder.bfloat16()(make_clips([12, 45]).bfloat16())
        assert seen == [(2, 64, FRAMES)] * 3

    def test_frames_that_are_no_numbers_are_no_silence(self):
        mel = make_clips([12, 45])
        mel[1, :, -3:] = float("nan")
        vectors = make_encoder()(mel)
        assert vectors[0].isfinite().all()
        assert vectors[1].isnan().all()
