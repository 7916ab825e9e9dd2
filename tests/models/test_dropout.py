"""Dropout's quick draws, alone and in attention."""

from __future__ import annotations

import pytest
import torch

from tortoise_hf.data.packing import pack
from tortoise_hf.models import attention, dropout
from tortoise_hf.models.attention import packed_attention
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT


@pytest.mark.parametrize("p", [0.1, 0.5, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_its_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    found = dropout.dropout(torch.ones(501, 1003, dtype=dtype), p)  # no multiple of the four that one number is for
    assert found.dtype == dtype
    dropped = (found == 0).double()
    assert float(dropped.mean()) == pytest.approx(p, abs=0.002)
    assert found.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=0.005)
    # One element tells nothing of the next, in either direction, nor of those that came from the same number.
    for first, second in ((dropped[1:], dropped[:-1]), *((dropped[:, n:], dropped[:, :-n]) for n in (1, 2, 3, 4))):
        assert float((first * second).mean()) == pytest.approx(p * p, abs=0.002)


def test_gradients_pass_where_values_do():
    hidden = torch.randn(7, 9, requires_grad=True)
    found = dropout.dropout(hidden, 0.3)
    found.sum().backward()
    torch.testing.assert_close(hidden.grad, found.detach() / hidden.detach())


def test_draws_are_of_the_default_generator():
    hidden = torch.ones(100)
    torch.manual_seed(3)
    first, second = dropout.dropout(hidden, 0.5), dropout.dropout(hidden, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout.dropout(hidden, 0.5), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("p, expected", [(0.0, 1.0), (1.0, 0.0)])
def test_none_and_all(p, expected):
    assert dropout.dropout(torch.ones(9), p).tolist() == [expected] * 9


def test_every_dropout_of_the_gpt_is_this_one():
    model = TortoiseGPT(GPTConfig(num_layers=2, hidden_size=32, num_heads=2, num_mel_codes=16, dropout=0.25))
    block = model.gpt.h[1]
    for module in (model.gpt.drop, block.attn.resid_dropout, block.mlp.dropout):
        assert type(module) is dropout.Dropout
        assert module.p == 0.25
        hidden = torch.ones(1000)
        assert 0 < int((module.train()(hidden) == 0).sum()) < 500
        assert torch.equal(module.eval()(hidden), hidden)


def packed_rows(*lengths: int):
    ones = torch.ones(len(lengths), dtype=torch.int64)
    mel_lengths = torch.tensor(lengths) - 2
    targets = torch.zeros(len(lengths), int(mel_lengths.max()), dtype=torch.int64)
    targets[torch.arange(targets.shape[1]) >= mel_lengths[:, None]] = -100
    return pack(ones, mel_lengths, torch.zeros(len(lengths), 1, dtype=torch.int64), targets)


def attended(heads, packing, **options):
    heads = [part.clone().requires_grad_() for part in heads]
    found = packed_attention(torch.nn.Identity(), *heads, None, packing=packing, **options)[0]
    (found * torch.arange(found.numel()).view_as(found).sin()).sum().backward()
    return [found.detach(), *(part.grad for part in heads)]


@pytest.mark.parametrize("scaling", [None, 0.5])
def test_attention_that_drops_nothing_is_torchs(monkeypatch, scaling):
    torch.manual_seed(0)
    packing, heads = packed_rows(9, 9, 5, 12), torch.randn(3, 1, 4, 35, 8)
    expected = attended(heads, packing, scaling=scaling)
    seen = []
    monkeypatch.setattr(attention, "drop", lambda weights, p: seen.append(p) or weights)
    found = attended(heads, packing, scaling=scaling, dropout=0.1)
    assert seen == [0.1] * 3, "one for each run of equally long rows"
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_attention_drops_weights(monkeypatch):
    """In the mean over many draws it is attention without dropout, and in each it isn't."""
    torch.manual_seed(0)
    packing, heads = packed_rows(9, 5), torch.randn(3, 1, 2, 14, 4)
    plain = packed_attention(torch.nn.Identity(), *heads, None, packing=packing)[0]
    draws = [packed_attention(torch.nn.Identity(), *heads, None, packing=packing, dropout=0.2)[0] for _ in range(2000)]
    assert min(float((draw - plain).abs().max()) for draw in draws) > 0.01
    assert float((torch.stack(draws).mean(0) - plain).abs().max()) < 0.1
    ones = (heads[0], heads[1], torch.ones_like(heads[2]))
    sums = packed_attention(torch.nn.Identity(), *ones, None, packing=packing, dropout=0.2)[0]
    first_of_each_row = sums[0, [0, 9]].flatten()  # it attends to itself alone: dropped or scaled up, nothing between
    assert all(
        value == pytest.approx(0, abs=1e-6) or value == pytest.approx(1.25, abs=1e-3)
        for value in first_of_each_row.tolist()
    )
