from pathlib import Path

import pytest
from conftest import make_config

from tortoise_hf.errors import UserError
from tortoise_hf.run import Run, fingerprint, open_run, write_run


def begin(cfg, data="abc", finished_step=None):
    run = Run(Path(cfg.training.output_dir), None, None)
    write_run(run, cfg, data, 10, max_steps=100, finished_step=finished_step)


def test_a_new_folder_begins_a_run(tmp_path):
    cfg = make_config(tmp_path)
    run = open_run(cfg, "abc", 100)
    assert (run.checkpoint, run.finished_step) == (None, None)
    (tmp_path / "run").mkdir()
    assert open_run(cfg, "abc", 100).checkpoint is None


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files but no run.json"):
        open_run(make_config(tmp_path), "abc", 100)


def test_resume_never_refuses_a_run(tmp_path):
    cfg = make_config(tmp_path, training__resume="never")
    begin(cfg)
    with pytest.raises(UserError, match=r"training.resume is never"):
        open_run(cfg, "abc", 100)


@pytest.mark.parametrize(
    "change",
    [{"training__batch_size": 8}, {"training__seed": 5}, {"data__padding": "stop"}, {"model__base": "elsewhere"}],
)
def test_settings_that_make_another_run_are_refused_by_name(tmp_path, change):
    begin(make_config(tmp_path))
    (key,) = change
    with pytest.raises(UserError, match=key.replace("__", r"\.")):
        open_run(make_config(tmp_path, **change), "abc", 100)


def test_settings_that_may_change(tmp_path):
    begin(make_config(tmp_path))
    changed = make_config(tmp_path, training__micro_batch_size=2, optim__learning_rate=1.0, training__eval_steps=7)
    assert open_run(changed, "abc", 200).checkpoint is None


def test_other_data_is_refused(tmp_path):
    cfg = make_config(tmp_path)
    begin(cfg)
    with pytest.raises(UserError, match="training clips that are not the ones found now"):
        open_run(cfg, "xyz", 100)


def test_a_finished_run_is_known_until_it_is_made_longer(tmp_path):
    cfg = make_config(tmp_path)
    begin(cfg, finished_step=90)
    assert open_run(cfg, "abc", 100).finished_step == 90
    assert open_run(cfg, "abc", 150).finished_step is None


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        open_run(make_config(tmp_path, training__resume=str(tmp_path / "checkpoint-3")), "abc", 100)


def test_fingerprint_tells_clips_and_lengths_apart():
    assert fingerprint(["a", "b"], [1, 2]) == fingerprint(["a", "b"], [1, 2])
    assert fingerprint(["a", "b"], [1, 2]) != fingerprint(["a", "b"], [1, 3])
    assert fingerprint(["a", "b"], [1, 2]) != fingerprint(["b", "a"], [1, 2])
