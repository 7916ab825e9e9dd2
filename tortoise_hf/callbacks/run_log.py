"""Keeps the run's figures in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

LOG_NAME = "log.jsonl"


class RunLogCallback(TrainerCallback):
    """Write every log entry as one JSON line into `output_dir/log.jsonl`.

    When a run is resumed the file starts over from the checkpoint's own history, so it has neither gaps nor doubles.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the resumed checkpoint remembers."""
        if state.is_world_process_zero:
            self.path = Path(args.output_dir) / LOG_NAME
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append the newest entry of the history."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
