"""The plan is arithmetic: facts and a made-up measurement in, a config without gaps out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import GOLDEN

from tortoise_hf.config import PLANNED, CallbackConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainingConfig
from tortoise_hf.plan import Facts, Measurement, Trial, micro_batch_candidates, resolve

GIB = 2**30


def left_open(**settings) -> Config:
    """A config in which only `section__name=value` is set."""
    cfg = Config(
        data=DataConfig(root="x"),
        model=ModelConfig(),
        optim=OptimConfig(),
        training=TrainingConfig(output_dir="r"),
        callbacks=CallbackConfig(),
    )
    return cfg.having({key.replace("__", "."): value for key, value in settings.items()})


def facts(num_train_clips=1000, num_eval_clips=50, **others) -> Facts:
    return Facts(
        **{
            "num_train_clips": num_train_clips,
            "num_eval_clips": num_eval_clips,
            "minutes": num_train_clips * 4 / 60,
            "num_parameters": 400_000_000,
            **others,
        }
    )


def gpu(usable=14 * GIB, per_clip=1 * GIB, device="cuda", tried=(1, 2, 4, 8, 16), checkpointing_share=0.2, **others):
    """A device on which weights and gradients take 3 GiB and AdamW 3 more."""
    trials = []
    for checkpointing in (False, True):
        for size in tried:
            growing = per_clip * size * (checkpointing_share if checkpointing else 1)
            trials.append(Trial(size, checkpointing, int(3 * GIB + growing)))
            if trials[-1].peak_bytes + 3 * GIB > usable:
                break
    return Measurement(
        device=device,
        usable_bytes=usable,
        fixed_bytes=3 * GIB,
        optimizer_bytes=3 * GIB,
        trials=tuple(trials),
        **{"seconds_per_clip": 0.1, **others},
    )


def origins(plan):
    return {row.name: row.origin for row in plan.rows}


# --- every gap is filled, every choice explained ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "tortoise"])
@pytest.mark.parametrize("num_clips", [1, 2, 7, 99, 1000, 13_000])
@pytest.mark.parametrize("measurement", [None, gpu()], ids=["unmeasured", "measured"])
def test_no_gap_is_left(kind, num_clips, measurement):
    plan = resolve(left_open(training__plan=kind), facts(num_clips), measurement)
    for key in PLANNED:
        needed = key != "optim.milestones" or kind == "tortoise"
        assert (plan.config.get(key) is not None) or not needed, key
    training = plan.config.training
    assert all(isinstance(getattr(training, name), int) for name in ("eval_steps", "save_steps", "logging_steps"))
    assert 1 <= training.eval_steps <= training.max_steps or kind == "tortoise"
    assert plan.steps_per_epoch == -(-num_clips // training.batch_size)
    assert training.max_steps == training.num_train_epochs * plan.steps_per_epoch  # every clip in every epoch
    for row in plan.rows:
        assert row.origin == "default" or row.origin.startswith("plan: "), row
    assert json.loads(json.dumps(plan.to_dict()))["rows"]
    assert Measurement.from_dict(plan.measurement.to_dict()) == plan.measurement if plan.measurement else True


SET = {
    "training__batch_size": 20,
    "training__micro_batch_size": 5,
    "training__eval_batch_size": 3,
    "training__max_steps": 77,
    "training__logging_steps": 9,
    "training__eval_steps": 11,
    "training__save_steps": 22,
    "model__gradient_checkpointing": True,
    "optim__lr_schedule": "multistep",
    "optim__warmup_steps": 0,
    "optim__milestones": (30, 60),
    "callbacks__early_stopping_patience": 0,
}


@pytest.mark.parametrize("kind", ["auto", "tortoise"])
def test_what_the_user_set_stands_and_is_marked(kind):
    plan = resolve(left_open(training__plan=kind, **SET), facts(), gpu())
    for key, value in SET.items():
        key = key.replace("__", ".")
        assert plan.config.get(key) == value
        assert origins(plan)[key] == "set by you"
    assert plan.config.training.num_train_epochs == 2  # 77 steps, 50 per epoch
    assert "set by you" in plan.table()


def test_one_override_leaves_the_others_to_the_plan():
    plan = resolve(left_open(training__batch_size=24), facts(), gpu())
    assert plan.config.training.batch_size == 24
    assert [name for name, origin in origins(plan).items() if origin == "set by you"] == ["training.batch_size"]


# --- auto ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_clips", "batch_size", "steps"),
    [(1, 1, 1), (5, 5, 1), (20, 7, 3), (99, 11, 9), (500, 56, 9), (1000, 125, 8), (13_000, 128, 102)],
)
def test_batches_of_small_datasets_are_small_and_even(num_clips, batch_size, steps):
    plan = resolve(left_open(), facts(num_clips))
    assert (plan.config.training.batch_size, plan.steps_per_epoch) == (batch_size, steps)
    last = num_clips - (steps - 1) * batch_size
    assert last > 0.5 * batch_size


def test_length_follows_minutes_of_audio():
    epochs = [resolve(left_open(), facts(minutes=m)).config.training.num_train_epochs for m in (5, 20, 30, 60, 1440)]
    assert epochs == [60, 60, 40, 20, 10]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_effective_batch_is_what_was_asked_wherever_it_runs(device, processes):
    """Memory decides how a step is cut, never what is in it."""
    for usable in (7 * GIB, 9 * GIB, 40 * GIB):
        plan = resolve(left_open(training__batch_size=64), facts(num_processes=processes), gpu(usable, device=device))
        training = plan.config.training
        assert training.batch_size == 64
        assert training.micro_batch_size <= -(-64 // processes)
        assert plan.prediction.memory_bytes <= usable


def test_memory_decides_the_micro_batch():
    """6 GiB are fixed, 1 GiB per clip: 8 clips fit into 14 GiB."""
    sizes = {u: resolve(left_open(), facts(), gpu(u * GIB)).config for u in (7, 8, 10, 14, 40)}
    assert [c.training.micro_batch_size for c in sizes.values()] == [4, 8, 4, 8, 32]
    assert [c.model.gradient_checkpointing for c in sizes.values()] == [True, True, False, False, False]
    plan = resolve(left_open(), facts(), gpu(14 * GIB))
    assert "largest that fits, 14.0 GiB measured" in origins(plan)["training.micro_batch_size"]


def test_sizes_that_were_not_tried_are_extrapolated():
    measurement = gpu(40 * GIB, tried=(1,))
    assert measurement.bytes_needed(8, False) == 14 * GIB
    assert resolve(left_open(), facts(), measurement).config.training.micro_batch_size == 32


def test_a_size_that_ran_out_of_memory_does_not_fit():
    measurement = dataclasses.replace(gpu(), trials=(Trial(1, False, 4 * GIB), Trial(2, False, None)))
    assert measurement.bytes_needed(4, False) is None
    plan = resolve(left_open(model__gradient_checkpointing=False), facts(), measurement)
    assert plan.config.training.micro_batch_size == 1
    plan = resolve(left_open(training__micro_batch_size=2, model__gradient_checkpointing=False), facts(), measurement)
    assert plan.config.training.micro_batch_size == 2
    assert any("did not fit in memory" in warning for warning in plan.warnings)


def test_candidates_end_with_the_whole_share():
    assert micro_batch_candidates(1, "cuda") == [1]
    assert micro_batch_candidates(11, "cuda") == [1, 2, 4, 8, 11]
    assert micro_batch_candidates(128, "cuda") == [1, 2, 4, 8, 16, 32]
    assert micro_batch_candidates(128, "cpu") == [1, 2, 4, 8]


def test_predicted_time_counts_training_and_evaluation():
    plan = resolve(
        left_open(training__max_steps=10, training__batch_size=100, training__eval_steps=5),
        facts(1000, 60),
        gpu(seconds_per_clip=0.5),
    )
    assert plan.prediction.seconds == pytest.approx(0.5 * (10 * 100 + 3 * 60 / 3))
    two = resolve(plan.config, facts(1000, 60, num_processes=2), gpu(seconds_per_clip=0.5))
    assert two.prediction.seconds == pytest.approx(plan.prediction.seconds / 2)
    assert "(nothing was measured)" in resolve(left_open(), facts()).table()


def test_predicted_disk_counts_newest_best_one_in_the_making_and_export():
    found = {
        kind: resolve(left_open(training__optimizer_state=kind), facts(num_parameters=100)).prediction.disk_bytes
        for kind in ("full", "8bit", "none")
    }
    assert found["full"] == 4 * 1200 + 800
    assert found["none"] == 4 * 400 + 800
    assert found["none"] < found["8bit"] < found["full"]


@pytest.mark.parametrize("num_eval_clips", [0, 10, 200, 5000])
def test_evaluations_stay_cheap(num_eval_clips):
    for num_train_clips in (50, 1000, 13_000):
        training = resolve(left_open(), facts(num_train_clips, num_eval_clips)).config.training
        trained = training.eval_steps * min(training.batch_size, num_train_clips)
        assert num_eval_clips / 3 <= 0.1 * trained * 1.01 or training.eval_steps == training.max_steps


# --- cadence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "steps"), [(0.1, 20), (0.33, 66), (0.5, 100), (0.001, 1), (0.999, 200)])
def test_shares_of_the_run_become_steps(share, steps):
    """As transformers rounds them: up."""
    settings = {"training__max_steps": 200, "training__eval_steps": share, "training__logging_steps": share}
    plan = resolve(left_open(**settings, training__save_steps=share), facts())
    training = plan.config.training
    assert (training.eval_steps, training.save_steps, training.logging_steps) == (steps, steps, steps)
    assert origins(plan)["training.eval_steps"] == f"set by you: {share:g} of the run"


def test_epochs_as_cadence_are_shown():
    plan = resolve(left_open(training__eval_strategy="epoch", training__logging_strategy="epoch"), facts())
    assert origins(plan)["training.eval_strategy"] == "set by you"
    assert "training.eval_steps" not in origins(plan)
    assert "training.logging_steps" not in origins(plan)
    assert "training.save_steps" in origins(plan)


def test_milestones_alone_mean_multistep():
    plan = resolve(left_open(optim__milestones=(5, 9)), facts())
    assert plan.config.optim.lr_schedule == "multistep"
    plan = resolve(left_open(optim__lr_schedule="multistep", training__max_steps=200), facts())
    assert plan.config.optim.milestones == (100, 150, 180)


# --- tortoise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [r for r in json.loads((GOLDEN / "param_calc.json").read_text()) if (r["bs_train"], r["first_decay"]) == (64, 20)],
    ids=lambda row: f"{row['n_train']}-{row['n_val']}",
)
def test_the_tortoise_plan_is_the_guides(row):
    plan = resolve(left_open(training__plan="tortoise"), facts(row["n_train"], row["n_val"]), gpu())
    training, optim = plan.config.training, plan.config.optim
    assert (training.batch_size, training.eval_batch_size) == (row["train_bs"], row["val_bs"])
    assert (training.logging_steps, training.eval_steps) == (row["print_freq"], row["val_freq"])
    assert training.save_steps == row["save_checkpoint_freq"]
    assert (optim.lr_schedule, list(optim.milestones)) == ("tortoise_multistep", row["lr_decay_steps"])
    assert (optim.warmup_steps, optim.learning_rate, optim.gamma) == (0, 1e-5, 0.5)
    assert [f"WARNING: {warning}" for warning in plan.warnings[: len(row["warnings"])]] == row["warnings"]


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (facts(127, 20), "127 training clips are few"),
        (facts(128, 19), "19 evaluation clips are few"),
        (facts(128, 19), "Holding back more would leave too little to train on"),
        (facts(129, 19), "Hold back more with data.min_eval_clips 20."),
        (facts(128, 0), "there are no evaluation clips"),
        (facts(128, 20, free_disk_bytes=10**9), "are free there"),
    ],
)
def test_warnings(found, said):
    plan = resolve(left_open(), found, gpu())
    (warning,) = plan.warnings
    assert said in warning
    assert f"Warning: {warning}" in plan.table()


def test_no_warning_without_a_reason():
    assert resolve(left_open(), facts(128, 20), gpu()).warnings == ()


def test_a_batch_larger_than_the_dataset_and_too_much_memory_are_named():
    plan = resolve(left_open(training__batch_size=200, training__micro_batch_size=64), facts(150, 20), gpu())
    assert len(plan.warnings) == 2
    assert "fewer than training.batch_size 200" in plan.warnings[0]
    assert "training.micro_batch_size" in plan.warnings[1]


# --- a run that goes on -----------------------------------------------------------------------------------------------


def stored(plan):
    return json.loads(json.dumps(plan.config.to_dict()))


@pytest.mark.parametrize("kind", ["auto", "tortoise"])
def test_a_run_keeps_its_plan_whatever_is_measured_later(kind):
    cfg = left_open(training__plan=kind, training__save_steps=0.25)
    begun = resolve(cfg, facts(), gpu(40 * GIB))
    later = resolve(cfg, facts(), gpu(7 * GIB, per_clip=GIB // 4), earlier=stored(begun))
    assert later.config == begun.config
    assert origins(later)["training.micro_batch_size"] == "as this run began"
    assert resolve(cfg, facts(), gpu(7 * GIB)).config != begun.config


def test_a_run_can_be_made_longer():
    begun = resolve(left_open(training__max_steps=100), facts(), gpu())
    longer = resolve(left_open(training__max_steps=200), facts(), gpu(), earlier=stored(begun))
    assert longer.config.training.max_steps == 200
    assert longer.config.training.eval_steps == begun.config.training.eval_steps
    again = resolve(left_open(), facts(), gpu(), earlier=stored(longer))  # without the flag: as the run was last
    assert again.config.training.max_steps == 200
    by_epochs = resolve(left_open(training__num_train_epochs=90), facts(), gpu(), earlier=stored(begun))
    assert by_epochs.config.training.max_steps == 90 * begun.steps_per_epoch
