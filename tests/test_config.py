import json

import pytest

from tortoise_hf.config import CallbackConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainingConfig


def test_defaults_are_the_reference_trainers():
    data, optim = DataConfig(root="x"), OptimConfig()
    assert (data.max_samples, data.max_text_ids, data.min_seconds) == (255_995, 200, 0.6)
    assert (optim.learning_rate, optim.beta1, optim.beta2, optim.weight_decay) == (1e-5, 0.9, 0.96, 0.01)
    assert (optim.text_loss_weight, optim.mel_loss_weight, optim.max_grad_norm) == (0.01, 1.0, 4.0)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (DataConfig, {"root": "x", "eval_fraction": 1.0}, "data.eval_fraction"),
        (DataConfig, {"root": "x", "min_seconds": 0.0}, "data.min_seconds"),
        (DataConfig, {"root": "x", "max_samples": 700_000}, "604 codes"),
        (DataConfig, {"root": "x", "max_text_ids": 403}, "wall of 402"),
        (DataConfig, {"root": "x", "num_conditioning_clips": 0}, "data.num_conditioning_clips"),
        (DataConfig, {"root": "x", "num_proc": 0}, "data.num_proc"),
        (OptimConfig, {"learning_rate": 0.0}, "optim.learning_rate"),
        (OptimConfig, {"milestones": (0,)}, "optim.milestones"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps"),
        (OptimConfig, {"beta2": 1.0}, "optim.beta2"),
        (TrainingConfig, {"output_dir": "r", "max_steps": 0}, "training.max_steps"),
        (TrainingConfig, {"output_dir": "r", "eval_steps": 0}, "training.eval_steps"),
        (TrainingConfig, {"output_dir": "r", "save_steps": 1.5}, "training.save_steps"),
        (TrainingConfig, {"output_dir": "r", "logging_steps": -0.1}, "training.logging_steps"),
        (TrainingConfig, {"output_dir": "r", "batch_size": 0}, "training.batch_size"),
        (CallbackConfig, {"early_stopping_patience": -1}, "callbacks.early_stopping_patience"),
    ],
)
def test_values_out_of_range_are_refused_by_name(section, values, named):
    with pytest.raises(ValueError, match=named):
        section(**values)


def test_the_longest_clip_allowed_fits_the_position_table():
    longest = DataConfig(root="x", max_samples=604 * 1024 - 1).max_samples
    assert longest // 1024 + 1 == 604


def test_training_settings_speak_the_callbacks_language():
    training = TrainingConfig(output_dir="r")
    assert json.loads(training.to_json_string())["output_dir"] == "r"
    assert training.to_dict()["save_total_limit"] == 2
    assert training.metric_for_best_model == "eval_loss"
    assert training.logging_dir == "r/logs"


def test_config_becomes_plain_values():
    cfg = Config(
        data=DataConfig(root="x"),
        model=ModelConfig(),
        optim=OptimConfig(milestones=(1, 2)),
        training=TrainingConfig(output_dir="r"),
        callbacks=CallbackConfig(),
    )
    assert json.loads(json.dumps(cfg.to_dict())) == cfg.to_dict()
    assert cfg.to_dict()["optim"]["milestones"] == [1, 2]
