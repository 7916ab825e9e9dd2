"""How long a speaker takes for a text, learnt from recordings."""

from __future__ import annotations

import pytest

from tortoise_hf.evaluation.endings import LengthModel, num_letters

TEXTS = ["A cat." * count for count in range(1, 16)]


def test_numbers_count_as_they_are_spoken():
    assert num_letters("51!") == num_letters("fifty-one") == len("fifty one")


def test_a_line_is_found():
    model = LengthModel.fit(TEXTS, [0.3 + 0.06 * num_letters(text) for text in TEXTS])
    assert model.seconds_besides == pytest.approx(0.3)
    assert model.seconds_per_letter == pytest.approx(0.06)
    assert model.seconds("a dog barked") == pytest.approx(0.3 + 0.06 * 12)


def test_a_few_recordings_give_a_pace():
    model = LengthModel.fit(["four", "eighteen letters 18"], [0.4, 3.0])
    assert model.seconds_besides == 0
    assert model.seconds_per_letter == pytest.approx(3.4 / (4 + num_letters("eighteen letters 18")))


def test_a_line_that_makes_no_sense_is_not_taken():
    """Longer texts in less time: noise."""
    model = LengthModel.fit(TEXTS, [5.0 - 0.02 * num_letters(text) for text in TEXTS])
    assert model.seconds_besides == 0
    assert model.seconds_per_letter > 0


def test_what_fits():
    model = LengthModel(0.1, 0.0)
    assert model.fits("ten letter", 1.29)
    assert model.fits("ten letter", 0.71)
    assert not model.fits("ten letter", 1.31)
    assert not model.fits("ten letter", 0.69)
