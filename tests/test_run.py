import dataclasses
import json

import pytest
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from transformers import TrainerState

from tortoise_hf.checkpoint import save_checkpoint
from tortoise_hf.config import OptimConfig
from tortoise_hf.data.check import DatasetReport
from tortoise_hf.errors import UserError
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.run import check_run_folder, fingerprint, open_run, read_record, write_record, write_report


def open_it(cfg, data="abc", steps_per_epoch=5):
    check_run_folder(cfg)
    return open_run(cfg, Accelerator(cpu=True), data, 10, steps_per_epoch)


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
    open_run(cfg, Accelerator(cpu=True), "abc", 10, 5, {"rows": [1, 2]})
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


def test_other_data_is_refused(tmp_path):
    cfg = make_config(tmp_path)
    open_it(cfg)
    with pytest.raises(UserError, match="training clips that are not the ones found now"):
        open_it(cfg, data="xyz")


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


def test_fingerprint_tells_clips_and_lengths_apart():
    assert fingerprint(["a", "b"], [1, 2]) == fingerprint(["a", "b"], [1, 2])
    assert fingerprint(["a", "b"], [1, 2]) != fingerprint(["a", "b"], [1, 3])
    assert fingerprint(["a", "b"], [1, 2]) != fingerprint(["b", "a"], [1, 2])
