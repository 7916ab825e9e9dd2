"""The figures of an evaluation: as a file for programs, as a table for people, as rows for a voice's card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tortoise_hf.evaluation.endings import TOLERANCE
from tortoise_hf.evaluation.plots import choose_colours, draw_bars, draw_groups, draw_lengths, draw_strips
from tortoise_hf.evaluation.recognition import WordErrors
from tortoise_hf.evaluation.speaker_similarity import Similarity

REPORT_FILE = "evaluation.json"
FORMAT = 1
OTHER_VOICES = "other voices"
RELIABLE_ACCURACY = 0.95
"""Share of unseen recordings that the speaker measure has to give to the right voice before its word counts."""


@dataclass(frozen=True)
class Spoken:
    """One judged utterance."""

    text: str
    seconds: float
    ended: bool
    expected_seconds: float | None
    """None without recordings to expect anything from."""
    repetition: int
    """Longest immediate repetition, in codes."""
    wav: str | None
    """Its sound, relative to the report's folder."""


@dataclass(frozen=True)
class Column:
    """All figures of a voice, or of the recordings it is compared with. A figure that wasn't measured is None."""

    name: str
    kind: str
    """voice, resynthesised or recordings."""
    spoken: tuple[Spoken, ...]
    words: WordErrors | None = None
    speaker: Similarity | None = None
    ended: float | None = None
    """Share that ended by itself; None for recordings, which all do."""
    as_long_as_expected: float | None = None
    """Share whose length is within 30 % of the expected one."""
    repeated: float | None = None
    """Share with a repetition above the limit."""


@dataclass(frozen=True)
class Check:
    """What is known of a channel's measures themselves."""

    speaker_measure: str | None = None
    speaker_accuracy: float | None = None
    """Share of unseen recordings given to the right voice; None if there was only one."""
    num_voices: int = 0
    num_unseen: int = 0
    learnt_from: str | None = None
    """recordings as they are, or resynthesised ones."""
    other_voices: dict[str, float] = field(default_factory=dict)
    """Similarity of other voices' recordings to the target, for comparison."""
    repetition_limit: int = 0
    """Codes from which on a repetition is a fault."""
    seconds_per_letter: float | None = None
    seconds_besides: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out."""

    settings: dict[str, Any]
    columns: tuple[Column, ...]
    checks: dict[str, Check]
    """Of each group of voices that share a DVAE, by the name of the first one."""
    unknown_words: tuple[str, ...] = ()
    """Words of the texts that the recogniser can't write down; they count as errors."""

    def save(self, folder: Path) -> None:
        """Write `evaluation.json` and the pictures."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(_rounded(content), indent=2, ensure_ascii=False)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        self._draw(folder)

    def _draw(self, folder: Path) -> None:
        colours = choose_colours([*(column.name for column in self.columns), OTHER_VOICES])
        words = {column.name: column.words for column in self.columns if column.words is not None}
        if words:
            draw_bars(
                folder / "word_error_rate.png",
                f"Word error rate ({self.settings['asr']})",
                "% of the words, with 95 % intervals",
                colours,
                {name: 100 * each.wer for name, each in words.items()},
                {name: (100 * each.interval[0], 100 * each.interval[1]) for name, each in words.items()},
            )
        similar = {column.name: column.speaker.each for column in self.columns if column.speaker is not None}
        if similar:
            check = next(check for check in self.checks.values() if check.speaker_measure)
            if check.other_voices:
                similar[OTHER_VOICES] = tuple(check.other_voices.values())
            title = f"Likeness to the speaker ({check.speaker_measure})"
            draw_strips(folder / "speaker_similarity.png", title, "similarity", colours, similar)
        lengths = {
            column.name: [(one.expected_seconds, one.seconds, one.ended) for one in column.spoken]
            for column in self.columns
            if column.kind != "resynthesised" and column.spoken and column.spoken[0].expected_seconds is not None
        }
        if lengths:
            title = f"Length, and what the speaker would take (± {TOLERANCE:.0%})"
            draw_lengths(folder / "lengths.png", title, colours, lengths, TOLERANCE)
        voices = [column for column in self.columns if column.kind == "voice"]
        groups = {
            "ended by itself": {column.name: column.ended for column in voices},
            "as long as expected": {column.name: column.as_long_as_expected for column in voices},
            "repeats itself": {column.name: column.repeated for column in voices},
        }
        groups = {
            name: {column: 100 * share for column, share in values.items()}
            for name, values in groups.items()
            if None not in values.values()
        }
        draw_groups(folder / "endings_and_repetition.png", "Endings and repetition", "% of the texts", colours, groups)

    def table(self) -> str:
        """A short table for the terminal, with what has to be known about it below."""
        rows = [
            ("words wrong (WER)", lambda column: column.words and f"{column.words.wer:.1%}"),
            ("  95 % interval", lambda column: column.words and "{:.1%} to {:.1%}".format(*column.words.interval)),
            ("  by guessing", lambda column: column.words and column.words.chance and f"{column.words.chance:.0%}"),
            ("like the speaker", lambda column: column.speaker and f"{column.speaker.similarity:.2f}"),
            ("  nearest of all voices", lambda column: column.speaker and _share(column.speaker.nearest_is_target)),
            ("ended by itself", lambda column: _share(column.ended)),
            (f"as long as expected ± {TOLERANCE:.0%}", lambda column: _share(column.as_long_as_expected)),
            ("repeats itself", lambda column: _share(column.repeated)),
        ]
        cells = [["", *(column.name for column in self.columns)]]
        cells += [[name, *(value(column) or "–" for column in self.columns)] for name, value in rows]
        cells = [row for row in cells if row[0] == "" or any(cell != "–" for cell in row[1:])]
        widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in cells
        ]
        return "\n".join([*lines, "", *self.remarks()])

    def remarks(self) -> list[str]:
        """What a reader has to know before believing the figures."""
        remarks = []
        for name, check in self.checks.items():
            of = f" ({name})" if len(self.checks) > 1 else ""
            if check.speaker_accuracy is not None:
                doubt = "" if check.speaker_accuracy >= RELIABLE_ACCURACY else "; too few to rely on its word"
                remarks.append(
                    f"Speaker measure {check.speaker_measure}{of}: it gives {check.speaker_accuracy:.1%} of "
                    f"{check.num_unseen:,} recordings it hasn't seen to the right one of {check.num_voices} voices"
                    f"{doubt}."
                )
            elif check.speaker_measure is not None:
                remarks.append(
                    f"Speaker measure {check.speaker_measure}{of}: unchecked, for want of other voices (--voices)."
                )
            if check.speaker_measure is not None and check.learnt_from == "recordings":
                remarks.append(
                    f"It learnt the speaker{of} from recordings as they are, not through the voice's models."
                )
        if self.unknown_words:
            more = f" and {len(self.unknown_words) - 5:,} more" if len(self.unknown_words) > 5 else ""
            remarks.append(
                "The recogniser doesn't know these words of the texts, so they count as wrong: "
                f"{', '.join(self.unknown_words[:5])}{more}."
            )
        if all(column.words is None for column in self.columns):
            remarks.append("Words were not checked: no recogniser was named.")
        if all(check.speaker_measure is None for check in self.checks.values()):
            remarks.append("The speaker and the lengths were not checked: no recordings were given.")
        return remarks


@dataclass(frozen=True)
class Metric:
    """A row of a voice card's table."""

    key: str
    """Short name, as the Hub's metric type."""
    name: str
    value: float
    unit: str


def metric_rows(evaluation: Mapping[str, Any], voice: str) -> list[Metric]:
    """Rows for a voice's card.

    Args:
        evaluation: content of `evaluation.json`.
        voice: name of the column.

    Returns: the voice's figures, each followed by that of the recordings where there is one.
    Raises: KeyError: if there is no such column.
    """
    columns = {column["name"]: column for column in evaluation["columns"]}
    if voice not in columns:
        raise KeyError(f"there is no voice {voice} in the evaluation, only {', '.join(columns)}")
    company = [column for column in evaluation["columns"] if column["kind"] != "voice"]
    metrics = []
    for key, name, unit, find in _METRICS:
        for column in (columns[voice], *company):
            value = find(column)
            if value is not None:
                suffix = _SUFFIXES[column["kind"]]
                metrics.append(Metric(key, name + suffix, value, unit))
    return metrics


_SUFFIXES = {"voice": "", "recordings": " of the recordings", "resynthesised": " of the resynthesised recordings"}
_METRICS = (
    ("wer", "word error rate", "share of words", lambda column: column["words"] and column["words"]["wer"]),
    (
        "speaker_similarity",
        "speaker similarity",
        "1 = as a recording, or cosine",
        lambda column: column["speaker"] and column["speaker"]["similarity"],
    ),
    (
        "nearest_speaker",
        "nearest to its speaker among all voices",
        "share of texts",
        lambda column: column["speaker"] and column["speaker"]["nearest_is_target"],
    ),
    ("ended", "ended by itself", "share of texts", lambda column: column["ended"]),
    ("length", "as long as expected", "share of texts", lambda column: column["as_long_as_expected"]),
    ("repetition", "repeats itself", "share of texts", lambda column: column["repeated"]),
)


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(each) for each in value]
    return value
