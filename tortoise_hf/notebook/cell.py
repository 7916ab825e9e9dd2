"""How a cell ends: quietly, or with a sentence instead of a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tortoise_hf.errors import UserError

P, R = ParamSpec("P"), TypeVar("R")


class CellStopped(Exception):
    """Ends a cell, and the cells behind it; IPython shows the message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def in_words(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose `UserError`s end the cell with their sentence."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise CellStopped(f"error: {error}") from None

    return call
