"""The exceptions meant for the person at the keyboard: a mistake put into words, and a run stopped on request."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """Something the user can mend; the message says where, what was found, what was expected and what to do next.

    Scripts print it without a traceback and leave with a non-zero exit code.
    """


class Interrupted(Exception):
    """A run was stopped by a signal after its last step was saved; scripts leave with `exit_code`."""

    def __init__(self, signal_number: int) -> None:
        """Remember which signal it was."""
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number
        """130 for SIGINT, 143 for SIGTERM, as shells count."""
