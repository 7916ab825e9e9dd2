"""Which rows of a dataset are used, which are not, and why: found out before training and reported once.

Nothing is replaced and nothing vanishes: every row is either kept or stands in the report with a reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from tortoise_hf.errors import UserError

ADVICE = {
    "malformed": "Write such lines as path|text or id|text|normalised text.",
    "missing_file": "Copy the files there or extract the archive again; or leave those lines out of the list.",
    "outside_folder": "Copy the recordings into the dataset folder, or allow it with --data.allow_outside true.",
    "duplicate_id": "Leave each clip in one list and on one line; the first line counts.",
    "empty_text": "Write down what is said, or remove the line.",
    "unknown_characters": "Spell these characters out (for instance & as and): the model has no sound for them.",
    "too_many_text_ids": "Cut the recording into shorter ones, or raise --data.max_text_ids (the model takes 402).",
    "unreadable": "Open the file in a player; export it again as WAV or FLAC.",
    "truncated": "The file ends before its header says; copy or extract it again.",
    "non_finite": "The file holds NaN or infinite samples; export it again.",
    "silent": "Nothing can be heard in the recording, or in the first of its channels, which is the one that counts; "
    "export it again in mono.",
    "too_short": "Leave such clips out, or lower --data.min_seconds.",
    "too_long": "Cut the recording into shorter ones, or raise --data.max_samples (the model takes 28 s).",
}
"""Reasons to leave a row out, in the order they are looked for, with what to do about it."""

EXAMPLES_PER_REASON = 3
"""Rows the summary names for each reason; the JSON names all."""
_BAR_WIDTH = 40


@dataclass(frozen=True)
class RowProblem:
    """A row that was left out."""

    list_name: str
    """The list it stands in."""
    row: int
    """Its line or row number there, from 1."""
    clip_id: str
    detail: str
    """What was found."""


@dataclass
class DatasetReport:
    """What the check found. `summary` is for people, `to_json` for programs."""

    source: str
    """Where the rows came from."""
    total: int
    """Rows looked at."""
    kept: int = 0
    """Rows used."""
    num_train: int = 0
    """Of these to train on."""
    num_eval: int = 0
    """Of these to evaluate on."""
    minutes: float = 0.0
    """Minutes of audio kept."""
    seconds_histogram: list[int] = field(default_factory=list)
    """Kept clips that last 0 to 1 s, 1 to 2 s, and so on."""
    speakers: dict[str, int] = field(default_factory=dict)
    """Kept clips of each speaker; "" is the one of a dataset that names none."""
    num_self_conditioned: int = 0
    """Kept clips whose speaker has no other clip to be conditioned on."""
    dropped: dict[str, list[RowProblem]] = field(default_factory=dict)
    """Rows left out, by reason (a key of `ADVICE`)."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know besides."""
    row_word: str = "line"
    """What a row is called: line of a list, or row of a Hub dataset."""

    @property
    def num_dropped(self) -> int:
        """Rows left out."""
        return sum(len(problems) for problems in self.dropped.values())

    def drop(self, reason: str, problem: RowProblem) -> None:
        """Note a row that is left out."""
        assert reason in ADVICE, reason
        self.dropped.setdefault(reason, []).append(problem)

    def count_kept(self, seconds: Sequence[float], speakers: Sequence[str]) -> None:
        """Note the lengths in seconds and the speakers of all kept clips."""
        self.kept = len(seconds)
        self.minutes = round(sum(seconds) / 60, 2)
        per_second = Counter(int(value) for value in seconds)
        self.seconds_histogram = [per_second[second] for second in range(max(per_second, default=-1) + 1)]
        self.speakers = dict(Counter(speakers).most_common())

    def summary(self) -> str:
        """The report as a few lines of text."""
        speakers = f", {len(self.speakers)} speakers" if len(self.speakers) > 1 else ""
        lines = [
            f"{self.source}: kept {self.kept:,} of {self.total:,} clips ({self.minutes:.1f} minutes{speakers}), "
            f"{self.num_train:,} to train on and {self.num_eval:,} to evaluate on."
        ]
        lines += self._histogram_lines()
        for reason in sorted(self.dropped, key=lambda reason: -len(self.dropped[reason])):
            problems = self.dropped[reason]
            lines.append(f"left out, {reason}: {len(problems):,}. {ADVICE[reason]}")
            lines += [f"    {self.describe(problem)}" for problem in problems[:EXAMPLES_PER_REASON]]
            if len(problems) > EXAMPLES_PER_REASON:
                lines.append(f"    and {len(problems) - EXAMPLES_PER_REASON:,} more")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def describe(self, problem: RowProblem) -> str:
        """One row in words: list, line, clip and what was found."""
        clip = f", {problem.clip_id}" if problem.clip_id else ""
        return f"{problem.list_name} {self.row_word} {problem.row}{clip}: {problem.detail}"

    def _histogram_lines(self) -> list[str]:
        most = max(self.seconds_histogram, default=0)
        first = next((second for second, count in enumerate(self.seconds_histogram) if count), 0)
        rows = []
        for second, count in list(enumerate(self.seconds_histogram))[first:]:
            bar = "#" * -(-count * _BAR_WIDTH // most)
            rows.append(f"  {second:>3} to {second + 1:>2} s  {count:>7,}  {bar}".rstrip())
        return rows

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetReport:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        dropped = {reason: [RowProblem(**row) for row in rows] for reason, rows in values.pop("dropped").items()}
        return cls(**values, dropped=dropped)

    def require_kept(self) -> None:
        """Stop if no row is left.

        Raises:
            UserError: with the commonest reasons.
        """
        if self.num_dropped == self.total:
            self.refuse(f"none of the {self.total:,} clips can be used" if self.total else "there is no clip in it")

    def refuse(self, what: str) -> NoReturn:
        """Stop because too many rows were left out.

        Raises:
            UserError: with the commonest reasons and what to do about the first.
        """
        if not self.dropped:
            raise UserError(f"{self.source}: {what}. A list needs at least one line with a recording and its text.")
        reasons = sorted(self.dropped, key=lambda reason: -len(self.dropped[reason]))
        counts = ", ".join(f"{len(self.dropped[reason]):,} {reason}" for reason in reasons[:3])
        first = self.describe(self.dropped[reasons[0]][0]).rstrip(".")
        raise UserError(f"{self.source}: {what} ({counts}; {first}). {ADVICE[reasons[0]]}")
