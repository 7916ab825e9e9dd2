"""What one row of a dataset is, wherever it came from.

Readers (`ljspeech.py`, `hub.py`) turn every line they meet into a row; a row that can't be used says so in `problem`
instead of vanishing, so the report of `check.py` accounts for every line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset, Features, Value

ROW_FEATURES = Features(
    {
        "clip_id": Value("string"),
        "text": Value("string"),
        "speaker": Value("string"),
        "audio_path": Value("string"),
        "row": Value("int64"),
        "list_name": Value("string"),
        "problem": Value("string"),
        "detail": Value("string"),
    }
)
"""Columns of the Datasets that readers return; `Row` says what they hold."""


@dataclass
class Row:
    """One clip as its list describes it."""

    clip_id: str
    """Path relative to the dataset folder without `wavs/` and extension; not necessarily unique."""
    text: str
    """Transcript as written, stripped."""
    speaker: str
    """Name of the speaker, "" if unknown."""
    audio_path: str
    """Absolute path of an existing file, links resolved; "" if there is none."""
    row: int
    """Line number in the list, or row number in the Hub dataset, from 1."""
    list_name: str
    """The list the row stands in."""
    problem: str = ""
    """Why the row can't be used ("malformed", "missing_file", "outside_folder", "duplicate_id"), or ""."""
    detail: str = ""
    """What was found and what to do about it, or ""."""


@dataclass(frozen=True)
class RawData:
    """What a reader found."""

    train: Dataset
    """Rows of the training list, columns as in `ROW_FEATURES`."""
    eval: Dataset | None
    """Rows of the evaluation list; None if there is none, so that clips have to be split off."""
    root: Path | None
    """Folder the audio lies in; None for a Hub dataset."""
    source: str
    """Where the rows came from, for the report: folder and lists, or the Hub dataset."""


def rows_to_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as a `datasets.Dataset` with the columns of `ROW_FEATURES`, in the same order."""
    columns = {name: [] for name in ROW_FEATURES}
    for row in rows:
        for name, value in asdict(row).items():
            columns[name].append(value)
    return Dataset.from_dict(columns, features=ROW_FEATURES)


def mark_clips_held_out(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Mark training rows "duplicate_id" whose recording is also an evaluation row, in place."""
    by_path = {row.audio_path: row for row in held_out if row.audio_path}
    for row in train:
        if row.audio_path in by_path and not row.problem:
            other = by_path[row.audio_path]
            row.problem = "duplicate_id"
            row.detail = f"the clip is also in {other.list_name} line {other.row} and is kept for evaluation"
