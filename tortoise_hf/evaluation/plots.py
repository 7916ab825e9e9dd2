"""Pictures of an evaluation as PNG, drawn with Pillow as the curve of a run is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tortoise_hf.hub.curve import nice_spacing

SIZE = (960, 540)
_SCALE = 2  # drawn larger and shrunk, for smooth lines
_BOX = (90, 70, 930, 470)
"""Left, top, right, bottom of the axes."""
_INK, _GRID, _BAND = (40, 40, 40), (225, 225, 225), (232, 240, 232)
Colour = tuple[int, int, int]
_COLOURS = ((110, 110, 110), (120, 160, 210), (200, 70, 40), (70, 140, 90), (150, 90, 170), (200, 150, 40))
"""Of the columns in their order: recordings, resynthesised, voices. They tell apart for colour-blind eyes too."""


class _Picture:
    """Axes with a linear scale on the left, in finished pixels."""

    def __init__(self, title: str, x_range: tuple[float, float], y_range: tuple[float, float], y_label: str) -> None:
        self.image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(15 * _SCALE)
        self._x_range = x_range
        spacing = nice_spacing(max(y_range[1] - y_range[0], 1e-6))
        low, high = math.floor(y_range[0] / spacing) * spacing, math.ceil(y_range[1] / spacing + 1e-9) * spacing
        self._y_range = (low, high)
        self.draw.text((_BOX[0] * _SCALE, 14 * _SCALE), title, fill=_INK, font=self.font)
        self.draw.text((_BOX[0] * _SCALE, 40 * _SCALE), y_label, fill=_INK, font=self.font)
        for index in range(round((high - low) / spacing) + 1):
            value = low + index * spacing
            self.line((x_range[0], value), (x_range[1], value), _GRID)
            x, y = self.place(x_range[0], value)
            self.draw.text((x - 10 * _SCALE, y), f"{value:g}", fill=_INK, font=self.font, anchor="rm")

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = (_SCALE * value for value in _BOX)
        share_x = (x - self._x_range[0]) / (self._x_range[1] - self._x_range[0])
        share_y = (y - self._y_range[0]) / (self._y_range[1] - self._y_range[0])
        return left + (right - left) * share_x, bottom - (bottom - top) * min(max(share_y, 0), 1)

    def line(
        self, start: tuple[float, float], end: tuple[float, float], colour: tuple[int, ...], width: int = 1
    ) -> None:
        self.draw.line([self.place(*start), self.place(*end)], fill=colour, width=width * _SCALE)

    def bar(self, x: float, width: float, height: float, colour: tuple[int, ...]) -> None:
        left, top = self.place(x - width / 2, height)
        right, bottom = self.place(x + width / 2, self._y_range[0])
        self.draw.rectangle((left, min(top, bottom - _SCALE), right, bottom), fill=colour)

    def dot(self, x: float, y: float, colour: tuple[int, ...], hollow: bool = False) -> None:
        self.draw.circle(
            self.place(x, y), 4 * _SCALE, fill=None if hollow else colour, outline=colour, width=2 * _SCALE
        )

    def below(self, x: float, text: str) -> None:
        """A label under the axis."""
        self.draw.text((self.place(x, 0)[0], (_BOX[3] + 10) * _SCALE), text, fill=_INK, font=self.font, anchor="ma")

    def above(self, x: float, y: float, text: str) -> None:
        """A value over a bar or line."""
        left, top = self.place(x, y)
        self.draw.text((left, top - 6 * _SCALE), text, fill=_INK, font=self.font, anchor="mb")

    def legend(self, colours: Mapping[str, Colour]) -> None:
        x = _BOX[2] * _SCALE
        for name, colour in reversed(colours.items()):
            x -= self.draw.textlength(name, self.font)
            self.draw.text((x, 48 * _SCALE), name, fill=_INK, font=self.font, anchor="lm")
            x -= 22 * _SCALE
            self.draw.circle((x + 10 * _SCALE, 48 * _SCALE), 5 * _SCALE, fill=colour)
            x -= 12 * _SCALE

    def save(self, path: Path) -> None:
        left, _, right, bottom = (_SCALE * value for value in _BOX)
        self.draw.line([(left, _BOX[1] * _SCALE), (left, bottom), (right, bottom)], fill=_INK, width=_SCALE)
        self.image.resize(SIZE, Image.Resampling.LANCZOS).save(path, optimize=True)


def choose_colours(names: Sequence[str]) -> dict[str, Colour]:
    """A colour for each column, the same in all pictures."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}


def draw_bars(
    path: Path,
    title: str,
    y_label: str,
    colours: Mapping[str, Colour],
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """A bar for each column.

    Args:
        path: of the PNG.
        title: what it shows.
        y_label: of the values.
        colours: of each column.
        values: of each column.
        intervals: low and high of each, drawn as a line over the bar.
    """
    highest = max([*values.values(), *(high for _, high in (intervals or {}).values()), 1e-6])
    picture = _Picture(title, (0, len(values)), (0, highest * 1.1), y_label)
    for index, (name, value) in enumerate(values.items()):
        picture.bar(index + 0.5, 0.5, value, colours[name])
        low, high = (intervals or {}).get(name, (value, value))
        picture.line((index + 0.5, low), (index + 0.5, high), _INK, 2)
        picture.above(index + 0.5, max(value, high), f"{value:.3g}")
        picture.below(index + 0.5, name)
    picture.save(path)


def draw_groups(
    path: Path, title: str, y_label: str, colours: Mapping[str, Colour], groups: Mapping[str, Mapping[str, float]]
) -> None:
    """Several bars side by side for each group, one for each column; all groups have the same columns."""
    columns = list(next(iter(groups.values())))
    picture = _Picture(title, (0, len(groups)), (0, 100), y_label)
    width = 0.8 / len(columns)
    for group, (name, values) in enumerate(groups.items()):
        for index, column in enumerate(columns):
            x = group + 0.1 + width * (index + 0.5)
            picture.bar(x, 0.85 * width, values[column], colours[column])
            picture.above(x, values[column], f"{values[column]:.0f}")
        picture.below(group + 0.5, name)
    picture.legend({column: colours[column] for column in columns})
    picture.save(path)


def draw_strips(
    path: Path, title: str, y_label: str, colours: Mapping[str, Colour], columns: Mapping[str, Sequence[float]]
) -> None:
    """A dot for every value, one column beside the other, with a line at each mean."""
    values = [value for column in columns.values() for value in column]
    picture = _Picture(title, (0, len(columns)), (min(0.0, *values), max(values)), y_label)
    for index, (name, column) in enumerate(columns.items()):
        for number, value in enumerate(column):
            spread = (number * 0.618034) % 1  # even, and the same every time
            picture.dot(index + 0.25 + 0.5 * spread, value, colours[name])
        mean = sum(column) / len(column)
        picture.line((index + 0.15, mean), (index + 0.85, mean), _INK, 2)
        picture.below(index + 0.5, name)
    picture.save(path)


def draw_lengths(
    path: Path,
    title: str,
    colours: Mapping[str, Colour],
    columns: Mapping[str, Sequence[tuple[float, float, bool]]],
    tolerance: float,
) -> None:
    """Lengths against expected lengths, with the band of what is as expected.

    Args:
        path: of the PNG.
        title: what it shows.
        colours: of each column.
        columns: (expected seconds, seconds, whether it ended by itself) of each utterance.
        tolerance: half width of the band, as a share.
    """
    points = [point for column in columns.values() for point in column]
    longest = max(expected for expected, _, _ in points) * 1.05
    tallest = max(*(seconds for _, seconds, _ in points), longest)
    picture = _Picture(title, (0, longest), (0, tallest), "seconds; hollow: did not end by itself")
    corners = [(0, 0), (longest, longest * (1 + tolerance)), (longest, longest * (1 - tolerance))]
    picture.draw.polygon([picture.place(*corner) for corner in corners], fill=_BAND)
    picture.line((0, 0), (longest, longest), _GRID, 2)
    for name, column in columns.items():
        for expected, seconds, ended in column:
            picture.dot(expected, seconds, colours[name], hollow=not ended)
    spacing = nice_spacing(longest)
    for tick in range(int(longest / spacing) + 1):
        picture.below(tick * spacing, f"{tick * spacing:g}")
    picture.draw.text(
        ((_BOX[0] + _BOX[2]) / 2 * _SCALE, (_BOX[3] + 36) * _SCALE), "expected seconds", fill=_INK,
        font=picture.font, anchor="ma",
    )  # fmt: skip
    picture.legend({name: colours[name] for name in columns})
    picture.save(path)
