"""Whether a row of codes repeats itself: a sound that is held, or a stretch said again at once.

The longest immediate repetition of a row is the largest number of codes in a row, each of which equals the code a fixed
distance before it, for any distance up to that number: a code said r times in a row is r - 1 long, `a b c a b c` is 3
long, `a b c a b c a b` is 5 long. Silence may repeat: codes whose decoded sound is far below the loudest don't count.

How long a repetition is one too many depends on the codebook (a small one holds the same code through a vowel), so the
limit is taken from recordings, see `choose_limit`.
"""

# C mel codes · F mel frames, 4 C

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

SILENT_DB = 30.0
"""A code is silent if its sound lies that far below the loudest of the row."""
LONGEST_DISTANCE = 64
"""Codes between a stretch and its repetition, at most: 3 s."""
FEWEST_CODES = 8
"""No limit is lower: 0.37 s. Of recordings of a synthetic voice hardly one repeats 4 codes of a codebook of 512."""
ALLOWED_SHARE = 0.01
"""Share of recordings that may repeat themselves by the limit."""


def longest_repetition(codes: torch.Tensor, log_mel: torch.Tensor) -> int:
    """Length of the longest immediate repetition that can be heard, in codes.

    Args:
        codes: (C,) without STOP.
        log_mel: (80, F) what the DVAE makes of them, not normalised; says what is silent.
    """
    if len(codes) < 2:
        return 0
    row, sounding = codes.cpu().numpy(), _sounding(log_mel, len(codes))
    longest = 0
    for distance in range(1, min(LONGEST_DISTANCE, len(row) // 2) + 1):
        same = (row[distance:] == row[:-distance]) & sounding[distance:]
        run = _longest_run(same)
        if run >= distance:
            longest = max(longest, run)
    return longest


def choose_limit(repetitions: Sequence[int]) -> int:
    """Length from which on a repetition is a fault, given the longest ones of recordings, perhaps none.

    The shortest, from `FEWEST_CODES` on, that at most `ALLOWED_SHARE` of the recordings reach.
    """
    allowed = math.floor(ALLOWED_SHARE * len(repetitions))
    longest = sorted(repetitions, reverse=True)[allowed : allowed + 1]
    return max([FEWEST_CODES, *(length + 1 for length in longest)])


def _sounding(log_mel: torch.Tensor, num_codes: int) -> np.ndarray:
    """(C,) whether each code can be heard, by the loudest of its four frames."""
    decibels = 10 / math.log(10) * log_mel.logsumexp(0)
    frames = torch.nn.functional.interpolate(decibels.view(1, 1, -1), size=4 * num_codes)[0, 0]
    per_code = frames.view(num_codes, 4).amax(1)
    return (per_code > per_code.max() - SILENT_DB).numpy()


def _longest_run(flags: np.ndarray) -> int:
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return int((ends - starts).max(initial=0))
