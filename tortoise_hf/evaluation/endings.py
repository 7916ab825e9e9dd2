"""Whether a voice ends by itself, and when: its length compared with what its speaker would take for the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tortoise_hf.evaluation.recognition import spoken_words

TOLERANCE = 0.3
"""An utterance is as long as expected if it is at most this share longer or shorter."""
_FEWEST_FOR_A_LINE = 10
"""Recordings below which a speaker's pauses can't be told from their pace; length is then proportional to the text."""


@dataclass(frozen=True)
class LengthModel:
    """Seconds that a speaker takes for a text: a straight line over its letters, fitted to recordings."""

    seconds_per_letter: float
    """Letters of the text with numbers written out, spaces included."""
    seconds_besides: float
    """What every recording takes besides, silence at its ends for instance."""

    @classmethod
    def fit(cls, texts: Sequence[str], seconds: Sequence[float]) -> LengthModel:
        """Least squares.

        Args:
            texts: (N,) transcripts.
            seconds: (N,) lengths of the recordings.
        """
        letters, measured = np.array([num_letters(text) for text in texts], float), np.array(seconds, float)
        if len(letters) >= _FEWEST_FOR_A_LINE and np.ptp(letters) > 0:
            columns = np.stack([letters, np.ones(len(letters))], axis=1)
            (slope, besides), *_ = np.linalg.lstsq(columns, measured, rcond=None)
            if slope > 0 and besides >= 0:
                return cls(float(slope), float(besides))
        return cls(float(measured.sum() / letters.sum()), 0.0)

    def seconds(self, text: str) -> float:
        """What the speaker would take."""
        return self.seconds_besides + self.seconds_per_letter * num_letters(text)

    def fits(self, text: str, seconds: float) -> bool:
        """Whether a length is within `TOLERANCE` of the expected one."""
        return abs(seconds / self.seconds(text) - 1) <= TOLERANCE


def num_letters(text: str) -> int:
    """Length of a text as it is spoken."""
    return len(spoken_words(text))
