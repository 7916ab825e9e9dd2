"""Pictures of sounds: a log-mel spectrogram as a PNG with labelled axes, drawn with Pillow as the curve of a run is."""

# S samples · F mel frames

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tortoise_hf.audio import HOP_LENGTH, LOG_FLOOR, MIN_MEL_SAMPLES, SAMPLE_RATE, LogMel

SIZE = (560, 210)
_BOX = (46, 8, 552, 172)
"""Left, top, right, bottom of the spectrogram."""
_LOUDEST = 5.0
"""Log-mel value drawn brightest. A thousandth of the demo voice's values is larger."""
_KILOHERTZ = (0.5, 1, 2, 4, 8)
_COLOURS = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))
"""From silence to loud, dark to bright for colour-blind eyes too; evenly spaced points of the magma scale."""
_INK, _NOTHING = (40, 40, 40), (236, 236, 236)


def draw_mel(waveform: torch.Tensor, seconds: float) -> bytes:
    """The spectrogram of a sound.

    Args:
        waveform: (S,) at 22,050 Hz.
        seconds: length of the time axis, so that pictures of several sounds can be compared; a longer sound makes it
            longer.

    Returns: a PNG of `SIZE`.
    """
    seconds = max(seconds, len(waveform) / SAMPLE_RATE)
    left, top, right, bottom = _BOX
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=_NOTHING)
    colours = _colour(_log_mel(waveform))
    num_frames = math.ceil(seconds * SAMPLE_RATE / HOP_LENGTH) + 1
    width = max(1, round((right - left) * colours.shape[1] / num_frames))
    picture = Image.fromarray(colours[::-1]).resize((width, bottom - top), Image.Resampling.BILINEAR)
    image.paste(picture.crop((0, 0, min(width, right - left), bottom - top)), (left, top))

    font = ImageFont.load_default(12)
    for value in _KILOHERTZ:
        y = bottom - 1 - (bottom - top - 1) * _mel(1000 * value) / _mel(8000)
        draw.line((left - 4, y, left, y), fill=_INK)
        draw.text((left - 7, min(max(y, top + 5), bottom - 5)), f"{value:g}", fill=_INK, font=font, anchor="rm")
    spacing = next(step for step in (0.5, 1, 2, 5, 10, 30, 60) if seconds / step <= 12 or step == 60)
    for index in range(int(seconds / spacing) + 1):
        x = left + (right - left) * index * spacing / seconds
        draw.line((x, bottom, x, bottom + 4), fill=_INK)
        draw.text((min(x, right - 8), bottom + 6), f"{index * spacing:g}", fill=_INK, font=font, anchor="ma")
    draw.line([(left - 1, top), (left - 1, bottom), (right, bottom)], fill=_INK)
    draw.text(((left + right) / 2, SIZE[1] - 2), "seconds", fill=_INK, font=font, anchor="mb")
    label = Image.new("RGB", (40, 16), "white")
    ImageDraw.Draw(label).text((20, 8), "kHz", fill=_INK, font=font, anchor="mm")
    image.paste(label.rotate(90, expand=True), (2, (top + bottom) // 2 - 20))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _log_mel(waveform: torch.Tensor) -> np.ndarray:
    """(80, F) natural logarithms of the powers."""
    short = MIN_MEL_SAMPLES - len(waveform)
    return LogMel()(torch.nn.functional.pad(waveform, (0, max(0, short))))[0].numpy()


def _colour(log_mel: np.ndarray) -> np.ndarray:
    """(80, F) to (80, F, 3) of 0 to 255."""
    silence = math.log(LOG_FLOOR)
    shares = np.clip((log_mel - silence) / (_LOUDEST - silence), 0, 1)
    points = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(shares, points, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _mel(hertz: float) -> float:
    """Height on the HTK scale, which the bins divide evenly."""
    return 2595 * math.log10(1 + hertz / 700)
