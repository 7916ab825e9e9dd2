"""The documentation's pictures come out of a run's own files."""

import importlib.util
import json

import pytest
from PIL import Image

from tortoise_hf.data.check import DatasetReport, RowProblem
from tortoise_hf.histogram import SIZE, draw_histogram


@pytest.fixture
def script(repository):
    spec = importlib.util.spec_from_file_location("make_docs_images", repository / "scripts" / "make_docs_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_report():
    report = DatasetReport("x", total=6)
    report.count_kept([1.5, 2.5, 2.7, 14.0], ["", "", "", ""])
    report.drop("too_long", RowProblem("metadata.csv", 5, "clip-5", "29 s"))
    return report


def make_run(run, roles=("recording", "base", "tuned")):
    samples = run / "samples"
    samples.mkdir(parents=True)
    (run / "dataset_report.json").write_text(make_report().to_json())
    (run / "log.jsonl").write_text("".join(f'{{"step": {n}, "loss": {3 - n}, "eval_loss": 2}}\n' for n in range(3)))
    for role in roles:
        Image.new("RGB", (560, 210), "white").save(samples / f"{role}.png")
    entry = {"text": "Hello."} | {role: f"{role}.wav" for role in roles}
    (samples / "samples.json").write_text(json.dumps([{"text": "No recording.", "tuned": "x.wav"}, entry]))
    return run


def test_three_pictures_are_made(script, tmp_path, capsys):
    script.main([str(make_run(tmp_path / "run")), "--output", str(tmp_path / "images")])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["curve.png", "dataset.png", "mels.png"]
    assert Image.open(tmp_path / "images" / "mels.png").size == (560, 3 * 240)
    assert "Made dataset.png, curve.png and mels.png" in capsys.readouterr().out


def test_a_run_without_samples_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "--output", str(tmp_path / "images")])
    assert "is no finished run with samples" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([str(make_run(tmp_path / "run", ("tuned",))), "--output", str(tmp_path / "images")])
    assert "has no sentence with a recording" in capsys.readouterr().err


@pytest.mark.parametrize("report", [make_report(), DatasetReport("nothing", total=0)], ids=["some", "none"])
def test_a_histogram_is_a_picture(report, tmp_path):
    (tmp_path / "x.png").write_bytes(draw_histogram(report))
    image = Image.open(tmp_path / "x.png")
    assert image.size == SIZE
    bars = sum(count for count, colour in image.convert("RGB").getcolors(1 << 20) if colour == (70, 130, 120))
    assert (bars > 1000) == (report.kept > 0)
