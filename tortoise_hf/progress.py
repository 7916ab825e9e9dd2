"""A progress bar for speaking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, int], None]]:
    """Counts finished samples and diffusion steps on a terminal."""
    with tqdm(total=total, unit="step", disable=not sys.stderr.isatty()) as bar:

        def report(stage: str, done: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.update(done)

        yield report
