"""scripts/prepare.py and the plan a run keeps, in this process to save the seconds of loading torch."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import REPOSITORY
from scripts.test_train import tiny_run


def call(script, flags):
    """A script's main, with the flags given."""
    spec = importlib.util.spec_from_file_location(script, REPOSITORY / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(flags)


def open_run_flags(base, data, tmp_path, name="run", **settings):
    """Flags of a run that leaves batch, length and cadence to the plan."""
    flags = tiny_run(base, data, tmp_path, name=name, **settings)
    left_out = {"batch_size", "micro_batch_size", "logging_steps", "eval_steps", "max_steps"}
    left_out = {f"--training.{key}" for key in left_out if f"training__{key}" not in settings}
    pairs = list(zip(flags[::2], flags[1::2], strict=True))
    return [word for key, value in pairs if key not in left_out for word in (key, value)]


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_prepare_reports_and_plans_and_training_follows(tiny_base, tiny_voice, tmp_path, capsys):
    flags = open_run_flags(tiny_base, tiny_voice(8), tmp_path, training__num_train_epochs=2)
    call("prepare", flags)
    prepared = capsys.readouterr().out
    folder = tmp_path / "run"
    assert "kept 8 of 8 clips" in prepared
    report = json.loads((folder / "dataset_report.json").read_text())
    assert report["num_train"] + report["num_eval"] == report["kept"] == 8
    assert f"Plan (auto) for {report['num_train']} clips" in prepared
    assert "Predicted: about" in prepared
    assert [path.name for path in folder.iterdir()] == ["dataset_report.json"]
    call("train", flags)
    trained = capsys.readouterr().out
    plan = [line for line in prepared.splitlines() if line.startswith("  training.")]
    assert len(plan) >= 5
    assert plan == [line for line in trained.splitlines() if line.startswith("  training.")]
    record = record_of(folder)
    assert record["plan"]["measurement"]["seconds_per_clip"] > 0
    assert {row["origin"] for row in record["plan"]["rows"]} >= {"set by you"}
    # Of a run that exists it shows the plan it was begun with, and changes nothing.
    call("prepare", flags)
    assert "as this run began" in capsys.readouterr().out
    assert record_of(folder) == record


def test_a_resumed_run_keeps_its_plan(tiny_base, tiny_voice, tmp_path, capsys, monkeypatch):
    """Whatever could be measured the second time isn't."""
    data = tiny_voice(8)
    call("train", open_run_flags(tiny_base, data, tmp_path, training__max_steps=2))
    begun = record_of(tmp_path / "run")["config"]
    monkeypatch.setattr("tortoise_hf.preparation.measure", None)
    call("train", open_run_flags(tiny_base, data, tmp_path, training__max_steps=4))
    longer = record_of(tmp_path / "run")["config"]
    assert "Going on from" in capsys.readouterr().out
    changed = {key for key in begun["training"] if begun["training"][key] != longer["training"][key]}
    assert changed == {"max_steps", "num_train_epochs"}
    assert {name: longer[name] for name in ("optim", "callbacks", "model", "data")} == {
        name: begun[name] for name in ("optim", "callbacks", "model", "data")
    }


def test_a_measured_run_has_the_numbers_of_one_that_was_not(tiny_base, tiny_voice, tmp_path, monkeypatch):
    data = tiny_voice(6)
    call("train", tiny_run(tiny_base, data, tmp_path, name="measured"))
    monkeypatch.setattr("tortoise_hf.preparation.measure", lambda *_: None)
    call("train", tiny_run(tiny_base, data, tmp_path, name="not-measured"))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("measured", "not-measured")]
    losses = [[entry.get("loss", entry.get("eval_loss")) for entry in map(json.loads, log)] for log in logs]
    assert len(losses[0]) >= 5
    assert losses[0] == losses[1]


def test_the_tortoise_plan_trains(tiny_base, tiny_voice, tmp_path, capsys):
    flags = open_run_flags(tiny_base, tiny_voice(6), tmp_path, training__plan="tortoise", training__max_steps=2)
    call("train", flags)
    out = capsys.readouterr().out
    assert "Plan (tortoise)" in out
    assert "the smallest dataset tested thus far had ~200 samples" in out
    record = record_of(tmp_path / "run")
    training = record["config"]["training"]
    assert (training["eval_steps"], training["logging_steps"]) == (60, 20)
    assert training["batch_size"] == record["num_train_clips"]  # 64 clips are more than there are


def test_another_plan_for_a_run_is_refused(tiny_base, tiny_voice, tmp_path, capsys):
    data = tiny_voice(6)
    call("train", open_run_flags(tiny_base, data, tmp_path, training__max_steps=1))
    with pytest.raises(SystemExit):
        call("train", open_run_flags(tiny_base, data, tmp_path, training__max_steps=1, training__plan="tortoise"))
    assert "was begun with training.plan auto" in capsys.readouterr().err
