"""The report: what was kept, what was left out and why."""

from __future__ import annotations

import json

import pytest

from tortoise_hf.data.check import ADVICE, DatasetReport, RowProblem
from tortoise_hf.errors import UserError


def make_report(**counts: int) -> DatasetReport:
    """A report on ten clips; `missing_file=2` leaves two out for that reason."""
    report = DatasetReport(source="/data/voice (metadata.csv)", total=10)
    row = 1
    for reason, count in counts.items():
        for _ in range(count):
            report.drop(reason, RowProblem("metadata.csv", row, f"LJ001-{row:04}", f"/data/LJ001-{row:04}.wav, found"))
            row += 1
    return report


def test_the_summary_says_what_was_kept_and_why_the_rest_was_not():
    report = make_report(too_long=1, missing_file=5)
    report.count_kept([1.5, 1.9, 3.0, 6.1], ["a", "a", "b", "b"])
    report.num_train, report.num_eval = 3, 1
    report.warnings.append("there is little data.")
    lines = report.summary().splitlines()
    assert lines[0] == (
        "/data/voice (metadata.csv): kept 4 of 10 clips (0.2 minutes, 2 speakers), 3 to train on and 1 to evaluate on."
    )
    assert [line.split() for line in lines[1:7]] == [
        ["1", "to", "2", "s", "2", "#" * 40],
        ["2", "to", "3", "s", "0"],
        ["3", "to", "4", "s", "1", "#" * 20],
        ["4", "to", "5", "s", "0"],
        ["5", "to", "6", "s", "0"],
        ["6", "to", "7", "s", "1", "#" * 20],
    ]
    # The commonest reason first; three rows of it by name, the rest as a number.
    assert lines[7] == f"left out, missing_file: 5. {ADVICE['missing_file']}"
    assert lines[8] == "    metadata.csv line 2, LJ001-0002: /data/LJ001-0002.wav, found"
    assert lines[11] == "    and 2 more"
    assert lines[12].startswith("left out, too_long: 1. ")
    assert lines[-1] == "warning: there is little data."
    assert report.num_dropped == 6


def test_json_holds_every_row_and_comes_back():
    report = make_report(missing_file=5, unknown_characters=1)
    report.count_kept([1.5, 1.9, 3.0, 6.1], ["a", "ä", "ä", "ä"])
    report.warnings.append("one")
    text = report.to_json()
    assert len(json.loads(text)["dropped"]["missing_file"]) == 5
    assert json.loads(text)["dropped"]["missing_file"][0] == {
        "list_name": "metadata.csv",
        "row": 1,
        "clip_id": "LJ001-0001",
        "detail": "/data/LJ001-0001.wav, found",
    }
    assert DatasetReport.from_json(text) == report


def test_rows_of_a_hub_dataset_are_no_lines():
    report = make_report(unreadable=1)
    report.row_word = "row"
    assert "    metadata.csv row 1, LJ001-0001: " in report.summary()


def test_nothing_kept_stops_with_the_commonest_reasons():
    report = make_report(too_short=2, missing_file=7, unreadable=1)
    with pytest.raises(UserError) as error:
        report.require_kept()
    message = str(error.value)
    assert "\n" not in message
    assert "none of the 10 clips can be used (7 missing_file, 2 too_short, 1 unreadable; metadata.csv line 3" in message
    assert message.endswith(ADVICE["missing_file"])


def test_an_empty_list_stops_too():
    with pytest.raises(UserError, match=r"there is no clip in it.*at least one line"):
        DatasetReport(source="/data/voice", total=0).require_kept()


def test_something_kept_goes_on():
    report = make_report(too_short=9)
    report.require_kept()
    assert report.num_dropped == 9  # one of ten is left, and nothing was raised
