"""Which rows of codes repeat themselves."""

from __future__ import annotations

import pytest
import torch

from tortoise_hf.evaluation.repetition import choose_limit, longest_repetition


def loud(num_codes):
    return torch.zeros(80, 4 * num_codes)


@pytest.mark.parametrize(
    "codes, length",
    [
        ("abcdefgh", 0),
        ("abccdefg", 1),
        ("abcccccd", 4),
        ("abcabc", 3),
        ("xabcabcy", 3),
        ("abcabcab", 5),
        ("abcxabc", 0),  # not at once
        ("abababab", 6),
        ("a", 0),
        ("", 0),
    ],
)
def test_longest_repetition(codes, length):
    row = torch.tensor([ord(letter) for letter in codes], dtype=torch.long)
    assert longest_repetition(row, loud(len(row))) == length


def test_silence_may_repeat():
    row = torch.tensor([1, 2, 3, 9, 9, 9, 9, 9, 9, 4, 5])
    log_mel = loud(len(row))
    assert longest_repetition(row, log_mel) == 5
    log_mel[:, 4 * 3 : 4 * 9] = -11.5
    assert longest_repetition(row, log_mel) == 0
    log_mel[:, 4 * 3 : 4 * 9] = -4.0  # 17 dB down: a quiet hum
    assert longest_repetition(row, log_mel) == 5


def test_frames_of_another_rate():
    """A vocoder's mel hasn't exactly four frames per code."""
    row = torch.tensor([1, 2, 3, 9, 9, 9, 9, 9, 9, 4, 5])
    log_mel = torch.zeros(80, 4 * len(row) + 3)
    log_mel[:, 12:38] = -11.5
    assert longest_repetition(row, log_mel) <= 1


def test_the_limit_is_what_recordings_hardly_reach():
    assert choose_limit([]) == 8
    assert choose_limit([0, 1, 1, 2]) == 8
    assert choose_limit([2] * 20 + [9]) == 10
    recordings = [3] * 150 + [11] * 49 + [20]
    assert choose_limit(recordings) == 12
    assert sum(length >= 12 for length in recordings) / len(recordings) <= 0.01
