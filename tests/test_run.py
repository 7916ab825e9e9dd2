import dataclasses
import json
import os
import subprocess
import sys

import datasets
import pytest
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from transformers import TrainerState

from tortoise_hf import faults
from tortoise_hf.checkpoint import save_checkpoint
from tortoise_hf.config import OptimConfig
from tortoise_hf.data.check import DatasetReport
from tortoise_hf.errors import UserError
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.run import (
    check_run_folder,
    clip_hashes,
    fingerprint,
    open_run,
    read_record,
    write_record,
    write_report,
)


def open_it(cfg, data="abc", steps_per_epoch=5):
    check_run_folder(cfg)
    return open_run(cfg, Accelerator(cpu=True), dict.fromkeys(data, "1"), steps_per_epoch)


def finish(cfg, run, step):
    model = golden_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_lr_scheduler(optimizer, OptimConfig(), 10)
    save_checkpoint(run.output_dir, Accelerator(cpu=True), model, optimizer, scheduler, TrainerState(global_step=step))
    write_record(dataclasses.replace(run, finished_step=step), cfg)


def test_a_new_folder_begins_a_run(tmp_path):
    cfg = make_config(tmp_path)
    run = open_it(cfg)
    assert (run.checkpoint, run.finished_step, run.max_steps) == (None, None, 100)  # 20 epochs of 5 steps
    assert open_it(cfg).checkpoint is None  # killed before the first checkpoint: it begins again


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "run").mkdir()
    assert open_it(make_config(tmp_path)).checkpoint is None


def test_a_folder_that_was_only_prepared_will_do(tmp_path):
    cfg = make_config(tmp_path)
    write_report(cfg, DatasetReport("here", 3))
    assert open_it(cfg).checkpoint is None
    assert json.loads((tmp_path / "run" / "dataset_report.json").read_text())["total"] == 3


def test_the_record_keeps_the_plan_and_is_found_again(tmp_path):
    cfg = make_config(tmp_path)
    assert read_record(cfg) is None
    open_run(cfg, Accelerator(cpu=True), dict.fromkeys("abc", "1"), 5, {"rows": [1, 2]})
    assert read_record(cfg)["plan"] == {"rows": [1, 2]}
    assert read_record(cfg)["config"] == cfg.to_dict()
    # A new run that goes on from another's checkpoint takes over that run's plan.
    other = make_config(tmp_path / "new", training__resume=str(tmp_path / "run" / "checkpoint-3"))
    assert read_record(other)["plan"] == {"rows": [1, 2]}
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json can't be read"):
        read_record(cfg)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files but no run.json"):
        open_it(make_config(tmp_path))


def test_resume_never_refuses_a_run(tmp_path):
    cfg = make_config(tmp_path, training__resume="never")
    open_it(cfg)
    with pytest.raises(UserError, match=r"training.resume is never"):
        open_it(cfg)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        open_it(make_config(tmp_path / "file"))


@pytest.mark.parametrize(
    "change",
    [
        {"training__batch_size": 8},
        {"training__seed": 5},
        {"training__plan": "tortoise"},
        {"data__padding": "stop"},
        {"model__base": "elsewhere"},
    ],
)
def test_settings_that_make_another_run_are_refused_by_name(tmp_path, change):
    open_it(make_config(tmp_path))
    (key,) = change
    with pytest.raises(UserError, match=key.replace("__", r"\.")):
        open_it(make_config(tmp_path, **change))


def test_settings_that_may_change(tmp_path):
    open_it(make_config(tmp_path))
    changed = make_config(tmp_path, training__micro_batch_size=2, optim__learning_rate=1.0, training__eval_steps=7)
    assert open_it(changed, steps_per_epoch=9).checkpoint is None


def test_other_data_is_refused_and_named(tmp_path):
    cfg = make_config(tmp_path)
    open_it(cfg)
    with pytest.raises(UserError, match=r"3 training clips that are not the 3 found now \(gone: a; new: d\)"):
        open_it(cfg, data="bcd")
    with pytest.raises(UserError, match=r"\(changed: b\)"):
        open_run(cfg, Accelerator(cpu=True), {"a": "1", "b": "2", "c": "1"}, 5)


def test_newer_checkpoints_than_the_one_gone_on_from_are_put_aside(tmp_path, capsys):
    cfg = make_config(tmp_path)
    run = open_it(cfg)
    for step in (3, 5, 7):
        finish(cfg, run, step)
    back = make_config(tmp_path, training__resume=str(tmp_path / "run" / "checkpoint-3"))
    assert open_it(back).checkpoint.step == 3
    assert {"checkpoint-3", "aside-1-checkpoint-5", "aside-1-checkpoint-7"} <= set(os.listdir(tmp_path / "run"))
    assert open_it(cfg).checkpoint.step == 3  # the next start doesn't take the other future
    (tmp_path / "run" / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    assert open_it(cfg).checkpoint is None  # damaged: the run begins again, and nothing is deleted
    assert (tmp_path / "run" / "aside-1-checkpoint-3" / "optimizer.pt").is_file()
    assert "is damaged" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_must_fit_too(tmp_path):
    cfg = make_config(tmp_path)
    finish(cfg, open_it(cfg), step=7)
    named = str(tmp_path / "run" / "checkpoint-7")
    with pytest.raises(UserError, match=r"training.batch_size 4"):
        open_it(make_config(tmp_path / "other", training__resume=named, training__batch_size=8))


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "LOCK_SECONDS", 0.3)
    cfg = make_config(tmp_path)
    program = "import sys, time; from pathlib import Path; from tortoise_hf.faults import lock_folder\n"
    program += "lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(UserError, match=f"in use by process {other.pid}"):
                open_it(cfg)
        finally:
            other.kill()
    assert open_it(cfg).checkpoint is None  # its lock went with it


def test_a_finished_run_is_known_until_it_is_made_longer(tmp_path):
    cfg = make_config(tmp_path)
    finish(cfg, open_it(cfg), step=7)
    run = open_it(cfg)
    assert (run.finished_step, run.checkpoint.step) == (7, 7)
    longer = open_it(cfg, steps_per_epoch=9)
    assert (longer.finished_step, longer.checkpoint.step) == (None, 7)


def test_a_checkpoint_may_be_named(tmp_path):
    cfg = make_config(tmp_path)
    finish(cfg, open_it(cfg), step=7)
    other = make_config(tmp_path / "other", training__resume=str(tmp_path / "run" / "checkpoint-7"))
    assert open_it(other).checkpoint.step == 7
    with pytest.raises(UserError, match="there is no such folder"):
        open_it(make_config(tmp_path, training__resume=str(tmp_path / "checkpoint-3")))


def test_fingerprint_tells_texts_codes_and_order_apart():
    def of(*clips):
        columns = dict(zip(("clip_id", "text_ids", "mel_codes"), zip(*clips, strict=True), strict=True))
        return fingerprint(clip_hashes(datasets.Dataset.from_dict(columns)))

    one, two = ("a", [1, 2], [3]), ("b", [4], [5, 6, 7])
    assert of(one, two) == of(one, two)
    assert len({of(one, two), of(two, one), of(one), of(one, ("b", [4], [5, 6, 8])), of(("a", [1], [2, 3]), two)}) == 5
