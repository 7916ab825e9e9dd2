"""The lengths of a dataset's clips as a PNG, drawn with Pillow as the curve of a run is."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from tortoise_hf.data.check import DatasetReport

SIZE = (960, 360)
_SCALE = 2  # drawn larger and shrunk, for smooth letters
_BOX = (70, 50, 940, 300)
"""Left, top, right, bottom of the axes."""
_BAR, _INK, _GRID = (70, 130, 120), (40, 40, 40), (225, 225, 225)


def draw_histogram(report: DatasetReport) -> bytes:
    """How many kept clips last how long, with what was kept and left out as its title.

    Returns: a PNG of `SIZE`.
    """
    counts = report.seconds_histogram or [0]
    most = max(1, *counts)
    left, top, right, bottom = (_SCALE * value for value in _BOX)
    image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15 * _SCALE)
    left_out = f", {report.num_dropped:,} left out" if report.num_dropped else ""
    title = f"{report.kept:,} clips, {report.minutes:.1f} minutes{left_out}"
    draw.text((left, top - 34 * _SCALE), title, fill=_INK, font=font)
    for share in (0.5, 1):
        y = bottom - (bottom - top) * share
        draw.line([(left, y), (right, y)], fill=_GRID, width=_SCALE)
        draw.text((left - 8 * _SCALE, y), f"{most * share:,.0f}", fill=_INK, font=font, anchor="rm")
    width = (right - left) / max(12, len(counts))  # the usual limit of 11.6 s keeps its place
    labels_every = 1 if len(counts) <= 20 else 5
    for second, count in enumerate([*counts, *[0] * (12 - len(counts))]):
        x = left + second * width
        if count:
            height = (bottom - top) * count / most
            draw.rectangle((x + width * 0.08, bottom - height, x + width * 0.92, bottom), fill=_BAR)
            draw.text((x + width / 2, bottom - height - 3 * _SCALE), f"{count:,}", fill=_INK, font=font, anchor="mb")
        if second % labels_every == 0:
            draw.text((x, bottom + 8 * _SCALE), f"{second}", fill=_INK, font=font, anchor="ma")
    draw.line([(left, bottom), (right, bottom)], fill=_INK, width=_SCALE)
    draw.text(((left + right) / 2, bottom + 32 * _SCALE), "seconds", fill=_INK, font=font, anchor="ma")
    stream = io.BytesIO()
    image.resize(SIZE, Image.Resampling.LANCZOS).save(stream, "PNG", optimize=True)
    return stream.getvalue()
