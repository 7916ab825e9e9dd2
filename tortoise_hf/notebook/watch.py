"""A run that trains, as its cell shows it: a bar and figures, the curve, the samples. Read from the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tortoise_hf.hub.curve import read_log
from tortoise_hf.notebook import show
from tortoise_hf.notebook.program import Program
from tortoise_hf.notebook.settings import where_to_write
from tortoise_hf.run import RUN_FILE
from tortoise_hf.sample_folder import SAMPLES_DIR, spoken_steps

LINES_SHOWN = 3
ENDINGS = ("Done: ", "This run was complete at ")
"""How the lines begin with which scripts/train.py sums up a run."""
RESULTS = (*ENDINGS, "Eval mel loss: ", "Lowest at step ")
"""Of the lines from there on, those shown: the others name files and commands, for which the notebook has cells."""
NEXT, FOR_A_SHELL = "Next:", ("  hear it: ", "  your own voice: ")
"""Behind the first come advice, which is shown, and commands, which aren't."""


class Watch:
    """Shows a run, redrawing only what changed."""

    def __init__(self, run_dir: Path) -> None:
        """Nothing is shown until the first look."""
        self.run_dir = run_dir
        self._bar, self._curve, self._samples, self._note = (show.Panel() for _ in range(4))
        self._log_size, self._spoken = -1, []

    def look(self, program: Program) -> None:
        """Bring what is shown up to date."""
        lines = "\n".join([*list(program.lines)[-LINES_SHOWN:], program.last][-LINES_SHOWN:])
        if program.interrupts:
            lines = "Stopping: the step in hand is finished and saved. This may take a minute.\n" + lines
        log = self._draw_bar(lines)
        if len(log) != self._log_size:
            self._log_size = len(log)
            self._curve.show(show.curve(log))
        spoken = spoken_steps(self.run_dir / SAMPLES_DIR)
        if spoken != self._spoken:
            self._spoken = spoken
            self._samples.show(show.samples(self.run_dir))

    def say(self, note: str) -> None:
        """A line below all."""
        self._note.show(show.text(note))

    def finish(self, program: Program) -> None:
        """Replace the line it was at by how the script summed up the run."""
        lines = list(program.lines)
        first = next((number for number, line in enumerate(lines) if line.startswith(ENDINGS)), len(lines))
        advice = lines.index(NEXT, first) if NEXT in lines[first:] else len(lines)
        shown = [line for line in lines[first:advice] if line.startswith(RESULTS)]
        shown += [line.strip() for line in lines[advice + 1 :] if not line.startswith(FOR_A_SHELL)]
        self._draw_bar(where_to_write("\n".join(shown)))

    def _draw_bar(self, lines: str) -> list[dict[str, Any]]:
        log = read_log(self.run_dir / "log.jsonl")
        figures = {key: value for entry in log for key, value in entry.items()}
        self._bar.show(show.progress(figures.get("step", 0), self._max_steps(), figures, lines))
        return log

    def _max_steps(self) -> int | None:
        try:
            return json.loads((self.run_dir / RUN_FILE).read_text(encoding="utf-8"))["max_steps"]
        except (OSError, ValueError):  # it hasn't begun
            return None
