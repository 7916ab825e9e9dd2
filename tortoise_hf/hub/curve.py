"""The curve of a run as a PNG: training and eval loss over the optimizer steps.

Drawn with Pillow, which is a tenth of matplotlib with all it brings along, so every voice gets its curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZE = (960, 540)
_SCALE = 2  # drawn larger and shrunk, for smooth lines
_BOX = (90, 50, 930, 470)
"""Left, top, right, bottom of the axes."""
_LINES = (("loss", "training loss", (120, 160, 210), 2), ("eval_loss", "eval loss", (200, 70, 40), 3))
_INK, _GRID = (40, 40, 40), (225, 225, 225)


def draw_curve(log_history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write the picture.

    Args:
        log_history: entries with `step` and `loss` or `eval_loss` (nats).
        path: of the PNG.

    Returns: whether there was anything to draw.
    """
    lines = {
        key: [(entry["step"], entry[key]) for entry in log_history if key in entry and math.isfinite(entry[key])]
        for key, *_ in _LINES
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return False
    last = max(1, *(step for step, _ in points))
    low, high = min(value for _, value in points), max(value for _, value in points)
    spacing = nice_spacing((high - low) or 1.0)
    low, high = math.floor(low / spacing) * spacing, (math.floor(high / spacing) + 1) * spacing
    left, top, right, bottom = (_SCALE * value for value in _BOX)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * (value - low) / (high - low)

    image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15 * _SCALE)
    for index in range(round((high - low) / spacing) + 1):
        value = low + index * spacing
        _, y = place(0, value)
        draw.line([(left, y), (right, y)], fill=_GRID, width=_SCALE)
        draw.text((left - 10 * _SCALE, y), f"{value:g}", fill=_INK, font=font, anchor="rm")
    step_spacing = max(1, round(nice_spacing(last)))
    for step in range(0, last + 1, step_spacing):
        x, _ = place(step, low)
        draw.text((x, bottom + 10 * _SCALE), f"{step:,}", fill=_INK, font=font, anchor="ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_INK, width=_SCALE)
    draw.text(((left + right) / 2, bottom + 36 * _SCALE), "optimizer steps", fill=_INK, font=font, anchor="ma")
    draw.text((left, top - 30 * _SCALE), "loss (nats)", fill=_INK, font=font)
    x = right - 320 * _SCALE
    for key, label, colour, width in _LINES:
        drawn = [place(*point) for point in lines[key]]
        if len(drawn) > 1:
            draw.line(drawn, fill=colour, width=width * _SCALE, joint="curve")
        if len(drawn) == 1 or key == "eval_loss":
            for point in drawn:
                draw.circle(point, 4 * _SCALE, fill=colour)
        draw.line([(x, top - 20 * _SCALE), (x + 24 * _SCALE, top - 20 * _SCALE)], fill=colour, width=width * _SCALE)
        draw.text((x + 32 * _SCALE, top - 20 * _SCALE), label, fill=_INK, font=font, anchor="lm")
        x += 165 * _SCALE
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path, optimize=True)
    return True


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a run's log file; a last line that isn't whole yet is left out. Empty if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def nice_spacing(extent: float) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that fits about five times into an extent."""
    power = 10.0 ** math.floor(math.log10(extent / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if extent / (factor * power) <= 6)
