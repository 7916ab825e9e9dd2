"""The file, the pictures, the table and the rows for a card."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from tortoise_hf.evaluation.recognition import word_errors
from tortoise_hf.evaluation.report import REPORT_FILE, Check, Column, Evaluation, Spoken, metric_rows
from tortoise_hf.evaluation.speaker_similarity import Similarity

TEXTS = ("The cat is sleeping.", "My sister eats rice.", "The dog waits here.")


def column(name, kind, heard, similarity, ended=None):
    spoken = tuple(
        Spoken(text, 1.5 + 0.4 * number, number != 1, 1.6 + 0.3 * number, number, None)
        for number, text in enumerate(TEXTS)
    )
    return Column(
        name=name,
        kind=kind,
        spoken=spoken,
        words=heard and word_errors(TEXTS, heard),
        speaker=similarity and Similarity(similarity, (similarity,) * 3, ("a", "a", "b"), 2 / 3),
        ended=ended,
        as_long_as_expected=1.0,
        repeated=1 / 3,
    )


@pytest.fixture
def evaluation():
    columns = (
        column("recordings", "recordings", TEXTS, None),
        column("resynthesised", "resynthesised", [TEXTS[0], TEXTS[1], "The dog weighs here."], 1.0),
        column("base", "voice", ["no", "idea", "what"], 0.31, ended=0.0),
        column("tuned", "voice", [TEXTS[0], TEXTS[1], ""], 0.87, ended=1.0),
    )
    check = Check("spectral", 0.988, 17, 170, "resynthesised", {"b": 0.3}, 5, 0.06, 0.2)
    return Evaluation({"asr": "pocketsphinx"}, columns, {"base": check})


def test_table(evaluation):
    lines = evaluation.table().splitlines()
    assert lines[0].split() == ["recordings", "resynthesised", "base", "tuned"]
    cells = {line[:30].split("  ")[0].strip(): line.split()[-4:] for line in lines[1:8]}
    assert cells["words wrong (WER)"] == ["0.0%", "8.3%", "100.0%", "33.3%"]
    assert cells["like the speaker"] == ["–", "1.00", "0.31", "0.87"]
    assert cells["ended by itself"] == ["–", "–", "0%", "100%"]
    assert "98.8% of 170 recordings it hasn't seen to the right one of 17 voices." in lines[-1]
    assert len({len(line) for line in lines[:9] if line}) == 1


def test_doubts_are_told(evaluation):
    check = dataclasses.replace(evaluation.checks["base"], speaker_accuracy=0.9, learnt_from="recordings")
    doubtful = dataclasses.replace(evaluation, checks={"base": check}, columns=evaluation.columns[2:3])
    assert "too few to rely on" in doubtful.table()
    assert "as they are" in doubtful.table()
    unchecked = dataclasses.replace(check, speaker_accuracy=None)
    assert "unchecked" in dataclasses.replace(evaluation, checks={"base": unchecked}).table()
    deaf = dataclasses.replace(evaluation, unknown_words=("zyxtor", "qux"))
    assert "count as wrong: zyxtor, qux." in deaf.table()
    bare = Evaluation({}, (column("base", "voice", None, None, ended=1.0),), {"base": Check()})
    assert "no recogniser" in bare.table()
    assert "no recordings" in bare.table()
    assert "words wrong" not in bare.table()


def test_file_and_pictures(evaluation, tmp_path):
    evaluation.save(tmp_path)
    content = json.loads((tmp_path / REPORT_FILE).read_text(encoding="utf-8"))
    assert [each["name"] for each in content["columns"]] == ["recordings", "resynthesised", "base", "tuned"]
    assert content["columns"][3]["words"]["deletions"] == 4
    assert content["columns"][3]["spoken"][1]["ended"] is False
    assert content["checks"]["base"]["speaker_accuracy"] == 0.988
    names = ("word_error_rate", "speaker_similarity", "lengths", "endings_and_repetition")
    pictures = {name: Image.open(tmp_path / f"{name}.png").convert("RGB") for name in names}
    for picture in pictures.values():
        assert picture.size == (960, 540)
        assert len(picture.getcolors(100_000)) > 10  # axes, letters and marks, not a white page
    # The bar of 100 % is as high as the axes are, nearly; that of 0 % isn't there.
    bars = pictures["word_error_rate"]
    rows = {index: sum(bars.getpixel((x, y)) not in ((255, 255, 255), (225, 225, 225)) for y in range(80, 465))
            for index, x in enumerate((150, 360, 570, 780))}  # fmt: skip
    assert rows[0] < 20 < rows[1] < rows[3] < rows[2]


def test_rows_for_a_card(evaluation, tmp_path):
    evaluation.save(tmp_path)
    content = json.loads((tmp_path / REPORT_FILE).read_text(encoding="utf-8"))
    rows = {row.name: row for row in metric_rows(content, "tuned")}
    assert rows["word error rate"].value == pytest.approx(4 / 12, abs=1e-4)
    assert rows["word error rate"].key == "wer"
    assert rows["word error rate of the recordings"].value == 0
    assert rows["word error rate of the resynthesised recordings"].value == pytest.approx(1 / 12, abs=1e-4)
    assert rows["speaker similarity"].value == 0.87
    assert rows["ended by itself"].value == 1
    assert "ended by itself of the recordings" not in rows
    assert all(row.unit for row in rows.values())
    with pytest.raises(KeyError, match=r"no voice other .* base, tuned"):
        metric_rows(content, "other")
