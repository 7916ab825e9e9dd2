"""Cross-entropy in pieces: the numbers of the whole, and a bound on memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tortoise_hf.memory import _Tally
from tortoise_hf.models import cross_entropy
from tortoise_hf.models.cross_entropy import MAX_LOGITS, largest_piece, sum_cross_entropy

VOCABULARY = 50


def case(num_positions=23, width=8, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary)
    with torch.no_grad():
        for value in head.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    states = torch.randn(num_positions, width, generator=generator, requires_grad=True)
    return head, states, torch.randint(vocabulary, (num_positions,), generator=generator)


def gradients(head, states):
    found = [states.grad, *(value.grad for value in head.parameters())]
    states.grad = None
    head.zero_grad()
    return found


@pytest.mark.parametrize("limit", [MAX_LOGITS, 23 * VOCABULARY, 22 * VOCABULARY, 5 * VOCABULARY, 1])
def test_pieces_give_the_numbers_of_the_whole(monkeypatch, limit):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
    head, states, targets = case()
    expected = F.cross_entropy(head(states), targets, reduction="sum")
    expected.backward()
    wanted = gradients(head, states)
    sizes = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    total = sum_cross_entropy(head, states, targets, VOCABULARY)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for found, value in zip(gradients(head, states), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    pieces = {MAX_LOGITS: 1, 23 * VOCABULARY: 1, 22 * VOCABULARY: 2, 5 * VOCABULARY: 5, 1: 23}[limit]
    assert len(sizes) == 2 * pieces - 1, "every piece but the last is computed again"
    assert max(sizes) == largest_piece(23, VOCABULARY) <= max(limit, VOCABULARY)


def test_without_targets_it_weighs_nothing():
    head, states, _ = case(0)
    total = sum_cross_entropy(head, states, torch.zeros(0, dtype=torch.long), VOCABULARY)
    total.backward()
    assert total.item() == 0
    assert all(not value.any() for value in gradients(head, states))


def test_nothing_is_computed_again_where_no_gradient_is_asked(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 5 * VOCABULARY)
    head, states, targets = case()
    with torch.no_grad():
        total = sum_cross_entropy(head, states, targets, VOCABULARY)
        assert total.item() == pytest.approx(F.cross_entropy(head(states), targets, reduction="sum").item(), rel=1e-6)
    assert not total.requires_grad


def test_half_precision_is_summed_more_precisely():
    head, states, targets = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = sum_cross_entropy(head, states, targets, VOCABULARY)
        logits = head(states)
    assert logits.dtype == torch.bfloat16
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(F.cross_entropy(logits.float(), targets, reduction="sum").item(), rel=1e-6)


class Watch(_Tally):
    """Counts backward passes as well, and remembers the largest tensor."""

    largest = 0

    def _count(self, tensor):
        self.largest = max(self.largest, tensor.numel())
        return super()._count(tensor)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("num_positions", [400, 1600])
def test_memory_is_that_of_one_piece_however_many_positions(monkeypatch, num_positions, half):
    limit = 100 * 512
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
    head, states, targets = case(num_positions, vocabulary=512)
    with Watch() as watch, torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        watch._count(states)
        before = watch.live
        sum_cross_entropy(head, states, targets, 512).backward()
    assert watch.largest == limit
    others = 4 * (3 * states.numel() + 3 * head.weight.numel() + 16 * num_positions)
    assert 2 * 4 * limit < watch.highest - before < 4 * 4 * limit + others
