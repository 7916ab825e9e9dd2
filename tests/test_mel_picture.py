"""The picture of a sound shows the right pitch at the right time."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image

from tortoise_hf.mel_picture import _BOX, SIZE, draw_mel

LEFT, TOP, RIGHT, BOTTOM = _BOX


def picture_of(waveform, seconds):
    image = Image.open(io.BytesIO(draw_mel(waveform, seconds)))
    assert image.size == SIZE
    return np.asarray(image.convert("RGB")).astype(int)


def tone(hertz, seconds):
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(22_050 * seconds)) / 22_050)


def test_a_tone_is_a_bright_line_at_its_pitch_for_as_long_as_it_lasts():
    pixels = picture_of(tone(2000, 1.0), seconds=2.0)
    middle = (LEFT + RIGHT) // 2
    column = pixels[TOP:BOTTOM, (LEFT + middle) // 2].sum(-1)
    mel = lambda hertz: math.log10(1 + hertz / 700)  # noqa: E731
    expected = (BOTTOM - TOP) * (1 - mel(2000) / mel(8000))
    assert abs(int(column.argmax()) - expected) < 4
    assert column.max() > 3 * np.median(column)
    after = pixels[TOP + 2 : BOTTOM - 2, middle + 8 : RIGHT - 2]
    assert after.min() == after.max()  # nothing is drawn where there is no sound


def test_higher_tones_stand_higher():
    rows = [
        int(picture_of(tone(hertz, 1.0), 1.0)[TOP:BOTTOM, (LEFT + RIGHT) // 2].sum(-1).argmax())
        for hertz in (300, 1000, 4000)
    ]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) == 3


def test_a_longer_sound_stretches_the_axis_and_a_short_one_is_filled_up():
    whole = picture_of(tone(1000, 3.0), seconds=1.0)[TOP:BOTTOM, RIGHT - 40].sum(-1)
    assert whole.max() > 3 * np.median(whole)
    assert picture_of(torch.zeros(100), seconds=1.0).shape == (*SIZE[::-1], 3)
