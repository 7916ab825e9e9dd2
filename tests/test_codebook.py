"""The codebook learns by the rules its module states."""

from __future__ import annotations

import math

import pytest
import torch

from tortoise_hf.codebook import (
    code_statistics,
    fit_centres,
    initialize,
    perplexity,
    quantize,
    revive,
    update_averages,
)
from tortoise_hf.models.dvae import Codebook


def codebook_of(*columns: list[float], sizes: list[float] | None = None) -> Codebook:
    """A codebook with these vectors, and averages that fit them."""
    codebook = Codebook(len(columns[0]), len(columns))
    codebook.embed.copy_(torch.tensor(columns).T)
    codebook.cluster_size.copy_(torch.ones(len(columns)) if sizes is None else torch.tensor(sizes))
    codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size)
    return codebook


def test_the_gradient_passes_straight_through_to_what_was_quantized():
    codebook = codebook_of([0.0, 0.0], [1.0, 1.0])
    vectors = torch.tensor([[[0.1, 0.8], [0.2, 0.9]]], requires_grad=True)
    codes, quantized = quantize(codebook, vectors)
    assert codes.tolist() == [[0, 1]]
    torch.testing.assert_close(quantized, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
    weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    (quantized * weights).sum().backward()
    assert torch.equal(vectors.grad, weights)


def test_averages_follow_by_hand():
    codebook = codebook_of([0.0], [10.0], sizes=[2.0, 4.0])
    statistics = code_statistics(codebook, torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1]))
    assert statistics.tolist() == [[4.0, 9.0], [2.0, 1.0]]
    update_averages(codebook, statistics, decay=0.75, eps=0.0)
    # sizes 0.75 * 2 + 0.25 * 2 and 0.75 * 4 + 0.25 * 1; sums 0.75 * 0 + 0.25 * 4 and 0.75 * 40 + 0.25 * 9
    torch.testing.assert_close(codebook.cluster_size, torch.tensor([2.0, 3.25]))
    torch.testing.assert_close(codebook.embed_avg, torch.tensor([[1.0, 32.25]]))
    torch.testing.assert_close(codebook.embed, torch.tensor([[0.5, 32.25 / 3.25]]))


def test_statistics_of_shares_add_up():
    codebook = codebook_of([0.0, 0.0], [1.0, 1.0], [2.0, 0.0])
    vectors, codes = torch.randn(10, 2), torch.randint(3, (10,))
    parts = [code_statistics(codebook, vectors[i::2], codes[i::2]) for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], code_statistics(codebook, vectors, codes))


def test_a_code_nothing_falls_to_stays_where_it_is():
    codebook = codebook_of([0.0], [10.0])
    for _ in range(200):
        update_averages(codebook, code_statistics(codebook, torch.ones(4, 1), torch.zeros(4, dtype=torch.int64)), 0.9)
    assert codebook.embed[0, 0].item() == pytest.approx(1, abs=1e-4)
    assert codebook.embed[0, 1].isfinite()
    assert codebook.cluster_size[1] < 1e-6


def test_dead_codes_come_back_to_life_and_the_others_stay():
    codebook = codebook_of([0.0], [50.0], [1.0], [-50.0], sizes=[10.0, 0.1, 9.0, 0.0])
    before = codebook.embed.clone()
    vectors = torch.tensor([[0.4], [0.6]])
    moved = revive(codebook, vectors, min_share=0.05, generator=torch.Generator().manual_seed(0))
    assert moved.tolist() == [1, 3]
    assert sorted(codebook.embed[0, moved].tolist()) == pytest.approx([0.4, 0.6])
    assert torch.equal(codebook.embed[:, [0, 2]], before[:, [0, 2]])
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * codebook.cluster_size)
    assert len(revive(codebook, vectors, min_share=0.05)) == 0, "a moved code is left alone for a while"
    assert set(codebook.nearest(vectors.T[None])[0].tolist()) == {1, 3}


def test_no_more_codes_are_moved_than_there_are_vectors():
    codebook = codebook_of([0.0], [50.0], [60.0], sizes=[10.0, 0.0, 0.0])
    assert revive(codebook, torch.tensor([[0.4]]), min_share=0.1).tolist() == [1]


def test_it_begins_on_the_centres_commonest_first():
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.randn(n, 2, generator=generator) * 0.01 + c for n, c in ((20, 0.0), (60, 5.0), (40, -5.0))]
    codebook = Codebook(2, 3)
    counts = initialize(codebook, torch.cat(clouds), seed=0)
    assert counts.tolist() == [60, 40, 20]
    torch.testing.assert_close(codebook.embed, torch.tensor([[5.0, -5.0, 0.0]] * 2), atol=0.02, rtol=0)
    torch.testing.assert_close(codebook.embed_avg, codebook.embed * codebook.cluster_size)


def test_fewer_different_points_than_centres_give_doubles():
    centres = fit_centres(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), 3, seed=0)
    assert set(centres.flatten().tolist()) == {0.0, 1.0}


def test_perplexity_of_equal_and_of_single_counts():
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([0, 7])) == pytest.approx(1)
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
