"""Held-out clips: how many, which, and what stays put when clips are added."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tortoise_hf.data.split import STRATUM_SECONDS, split_rows

LIMITS = {"eval_fraction": 0.05, "min_clips": 8, "max_clips": 200}


def clips(num_clips: int, seed: int) -> tuple[list[str], list[float]]:
    """Texts and durations (seconds) of made-up clips."""
    draw = random.Random(seed)
    texts = [f"sentence {seed} {draw.random()}" for _ in range(num_clips)]
    return texts, [min(max(draw.gammavariate(6, 1.1), 0.6), 11.6) for _ in range(num_clips)]


@pytest.mark.parametrize("num_clips", [2, 3, 7, 16, 17, 60, 430, 5000])
def test_counts_keep_to_their_limits_and_every_clip_is_on_one_side(num_clips):
    for seed in range(5):
        train, held_out = split_rows(*clips(num_clips, seed), **LIMITS)
        assert sorted(train + held_out) == list(range(num_clips))
        assert train == sorted(train)
        assert held_out == sorted(held_out)
        assert min(8, num_clips // 2) <= len(held_out) <= min(200, num_clips // 2)


def test_one_clip_is_trained_on():
    assert split_rows(["hello"], [2.0], **LIMITS) == ([0], [])
    assert split_rows([], [], **LIMITS) == ([], [])


def test_two_clips_make_one_each_unless_they_say_the_same():
    train, held_out = split_rows(["hello", "world"], [2.0, 3.0], **LIMITS)
    assert len(train) == len(held_out) == 1
    assert split_rows(["hello", "hello"], [2.0, 3.0], **LIMITS) == ([0, 1], [])


def test_fraction_zero_holds_out_nothing():
    train, held_out = split_rows(*clips(100, 0), eval_fraction=0.0, min_clips=8, max_clips=200)
    assert (len(train), held_out) == (100, [])


def test_share_is_near_the_fraction_where_no_limit_bites():
    shares = []
    for seed in range(20):
        held_out = split_rows(*clips(1000, seed), eval_fraction=0.1, min_clips=8, max_clips=200)[1]
        shares.append(len(held_out) / 1000)
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.01)
    assert all(0.07 < share < 0.13 for share in shares)


@pytest.mark.parametrize("num_texts", [1, 2, 5, 30, 200])
def test_no_text_is_on_both_sides(num_texts):
    for seed in range(10):
        draw = random.Random(seed)
        texts = [f"sentence {draw.randrange(num_texts)}" for _ in range(200)]
        seconds = [draw.uniform(0.6, 11.6) for _ in texts]
        train, held_out = split_rows(texts, seconds, **LIMITS)
        assert not {texts[index] for index in train} & {texts[index] for index in held_out}
        assert len(held_out) <= 100
        assert train


def test_a_text_that_many_clips_share_is_trained_on():
    texts, seconds = clips(100, 0)
    for seed in range(50):
        common = f"common {seed}"
        _, held_out = split_rows([common] * 40 + texts, [2.0] * 40 + seconds, **LIMITS)
        assert not any(index < 40 for index in held_out)


def test_every_stratum_of_durations_gets_its_share():
    for seed in range(20):
        texts, seconds = clips(1000, seed)
        _, held_out = split_rows(texts, seconds, eval_fraction=0.1, min_clips=8, max_clips=1000)
        strata = Counter(int(value // STRATUM_SECONDS) for value in seconds)
        found = Counter(int(seconds[index] // STRATUM_SECONDS) for index in held_out)
        for stratum, count in strata.items():
            assert 0.075 * count - 1 <= found[stratum] <= 0.125 * count + 1


def test_order_doesnt_matter():
    texts, seconds = clips(200, 3)
    held_out = {texts[index] for index in split_rows(texts, seconds, **LIMITS)[1]}
    order = random.Random(0).sample(range(200), 200)
    shuffled = [texts[index] for index in order]
    again = {shuffled[index] for index in split_rows(shuffled, [seconds[index] for index in order], **LIMITS)[1]}
    assert held_out == again


def test_added_clips_move_few_others():
    moved = held = 0
    for seed in range(40):
        texts, seconds = clips(440, seed)
        before = set(split_rows(texts[:400], seconds[:400], **LIMITS)[1])
        after = {index for index in split_rows(texts, seconds, **LIMITS)[1] if index < 400}
        moved += len(before ^ after)
        held += len(before)
    # A split by position or by a shuffled list would move nearly all of them.
    assert moved < 0.1 * held


def test_one_added_clip_moves_at_most_one_other():
    for seed in range(40):
        texts, seconds = clips(301, seed)
        before = set(split_rows(texts[:300], seconds[:300], **LIMITS)[1])
        after = {index for index in split_rows(texts, seconds, **LIMITS)[1] if index < 300}
        assert len(before ^ after) <= 1


def test_lengths_must_match():
    with pytest.raises(ValueError, match="2 texts and 1 durations"):
        split_rows(["a", "b"], [1.0], **LIMITS)
