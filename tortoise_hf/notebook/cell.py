"""How a cell ends: quietly, or with a sentence instead of a traceback."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from tortoise_hf.errors import UserError

P, R = ParamSpec("P"), TypeVar("R")


class CellStopped(Exception):
    """Ends a cell, and the cells behind it; IPython shows the message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextmanager
def bars_of_the_hub() -> Iterator[None]:
    """Within it the Hub's client draws its progress bars if it can; as mere text they would fill the page."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    drawn = importlib.util.find_spec("ipywidgets") is not None  # Colab, Kaggle and JupyterLab have it
    if drawn or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def in_words(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose `UserError`s end the cell with their sentence."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise CellStopped(f"error: {error}") from None

    return call
