"""What the Hub's client says while it waits for a Hub that doesn't answer, in one line instead of eleven."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_CLIENT_LOG = "huggingface_hub.utils._http"


@contextmanager
def retries_in_one_line() -> Iterator[None]:
    """Within it, or within a function that it decorates, only the first of the client's tries is told."""
    log, once = logging.getLogger(_CLIENT_LOG), _FirstTry()
    log.addFilter(once)
    try:
        yield
    finally:
        log.removeFilter(once)


class _FirstTry(logging.Filter):
    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the first try, drop the others."""
        message = record.getMessage()
        if "thrown while requesting" not in message and not message.startswith("Retrying in"):
            return True
        if self.told:
            return False
        self.told = True
        reason = message.partition(" thrown while requesting")[0].strip("'")
        record.msg, record.args = f"The Hub doesn't answer ({reason}); trying for half a minute.", ()
        return True
