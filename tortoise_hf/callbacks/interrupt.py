"""Ctrl-C and SIGTERM end a run after the step in hand, with everything saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from tortoise_hf.errors import Interrupted

PATIENCE_SECONDS = 1.0
"""A launcher passes the user's Ctrl-C on as a signal of its own; only a signal later than this counts as a second
one."""
LAUNCHER_PATIENCE_SECONDS = 3.0
"""The same where torch's launcher watches several processes: it takes a moment to pass the signal on."""


class InterruptCallback(TrainerCallback):
    """Save after the step in which a signal came, then raise `Interrupted`; a second signal ends the process at once.

    Stands behind `CheckpointCallback` in the list, so the checkpoint is complete when the exception leaves the loop.
    """

    def __init__(self, accelerator: Accelerator, before_leaving: Callable[[], None] = lambda: None) -> None:
        """Processes agree on stopping through `accelerator`; a signal while `before_leaving` works ends it at once."""
        self.accelerator, self.before_leaving = accelerator, before_leaving
        self.received = 0
        self.received_at = 0.0
        self.stopping = 0
        self.previous: dict[int, Any] = {}
        self.parent = os.getppid()
        watched = "TORCHELASTIC_RUN_ID" in os.environ
        self.patience = LAUNCHER_PATIENCE_SECONDS if watched else PATIENCE_SECONDS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the two signals; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a save if any process got a signal."""
        self.stopping = self._agree()
        if self.stopping:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is on disk: leave."""
        if self.stopping:
            self.give_signals_back()
            self.before_leaving()
            raise Interrupted(self.stopping)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back; one that came during the last evaluation or save stops the run here."""
        self.stopping = self._agree()
        self.give_signals_back()
        if self.stopping:
            raise Interrupted(self.stopping)

    def give_signals_back(self) -> None:
        """Restore the handlers found at the start."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _agree(self) -> int:
        """The signal that any process got; 0 for none."""
        if self.accelerator.num_processes == 1:
            return self.received
        return int(self.accelerator.gather(torch.tensor(self.received, device=self.accelerator.device)).max())

    def _note(self, number: int, frame: Any) -> None:
        # The launcher's death sends a signal as well (see machine.py); the user has asked once for all that.
        launcher_died = self.parent != os.getppid()
        self.parent = os.getppid()
        if self.received and not launcher_died and time.monotonic() - self.received_at > self.patience:
            os._exit(128 + number)
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            if self.accelerator.is_main_process:
                _say("\nFinishing this step, then saving. Press Ctrl-C once more to leave at once.")


def _say(sentence: str) -> None:
    """Print from within a signal handler; the run goes on whatever becomes of it."""
    try:
        print(sentence, flush=True)
    except RuntimeError:  # the signal came in the middle of another print, in which Python allows no second one
        with contextlib.suppress(OSError):
            os.write(2, f"{sentence}\n".encode())
    except OSError:
        pass  # nobody reads it any more
