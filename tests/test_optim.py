import json

import pytest
import torch
from conftest import GOLDEN, golden_gpt

from tortoise_hf.config import OptimConfig
from tortoise_hf.optim import (
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
    lr_factor,
    parameter_groups,
    reference_factor,
)


def test_groups_are_the_reference_trainers():
    golden = json.loads((GOLDEN / "optimizer_groups.json").read_text())
    decay, no_decay = parameter_groups(golden_gpt(), weight_decay=golden["weight_decay"][0])
    assert decay["names"] == golden["decay"]
    assert no_decay["names"] == golden["no_decay"]
    assert [decay["weight_decay"], no_decay["weight_decay"]] == golden["weight_decay"]
    cfg = OptimConfig()
    assert ([cfg.beta1, cfg.beta2], cfg.eps) == (golden["betas"], golden["eps"])


def test_every_trained_parameter_is_in_exactly_one_group():
    model = golden_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_each_group_is_clipped_by_itself():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [a]}, {"params": [b]}])
    a.grad, b.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    norms = clip_gradients(optimizer, 4.0)
    torch.testing.assert_close(norms, torch.tensor([50.0, 0.5]))
    torch.testing.assert_close(a.grad, torch.tensor([2.4, 3.2]))
    torch.testing.assert_close(b.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"lr_schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"lr_schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447, 0]),
        ({"lr_schedule": "cosine", "min_lr_ratio": 0.2}, [1, 0.882843, 0.6, 0.317157, 0.2]),
        ({"lr_schedule": "multistep", "milestones": (1, 3, 3), "gamma": 0.5}, [1, 0.5, 0.5, 0.125, 0.125]),
        ({"lr_schedule": "inverse_sqrt"}, [1, 0.707107, 0.57735, 0.5, 0.447214]),
        ({"lr_schedule": "inverse_sqrt", "warmup_steps": 2}, [0.5, 1, 0.816497, 0.707107, 0.632456]),
        ({"lr_schedule": "linear", "warmup_steps": 2}, [0.5, 1, 1, 0.5, 0]),
    ],
)
def test_schedules(settings, expected):
    cfg = OptimConfig(**settings)
    assert [lr_factor(step, cfg, max_steps=4) for step in range(5)] == pytest.approx(expected, abs=1e-6)


GOLDEN_SCHEDULES = json.loads((GOLDEN / "lr_schedule.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN_SCHEDULES, ids=lambda golden: str(golden["milestones"]))
def test_multistep_as_the_reference_trainer_has_it(golden):
    for step, rate in golden["lr_at_step"]:
        factor = reference_factor(step, golden["milestones"], golden["gamma"], golden["start_step"])
        assert golden["base_lr"] * factor == pytest.approx(rate, rel=1e-12)
        if golden["start_step"] == 0:
            cfg = OptimConfig(
                lr_schedule="tortoise_multistep", milestones=tuple(golden["milestones"]), gamma=golden["gamma"]
            )
            assert lr_factor(step - 1, cfg, max_steps=100) == factor


def test_its_milestones_act_two_steps_earlier_than_ours():
    ours = OptimConfig(lr_schedule="multistep", milestones=(10, 20))
    theirs = OptimConfig(lr_schedule="tortoise_multistep", milestones=(12, 22))
    assert [lr_factor(step, ours, 30) for step in range(30)] == [lr_factor(step, theirs, 30) for step in range(30)]


@pytest.mark.parametrize(
    "schedule", ["constant", "linear", "cosine", "multistep", "tortoise_multistep", "inverse_sqrt"]
)
def test_every_schedule_warms_up_alike(schedule):
    cfg = OptimConfig(lr_schedule=schedule, warmup_steps=4, milestones=(50,))
    assert [lr_factor(step, cfg, 100) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1], abs=0.11)
    assert [lr_factor(step, cfg, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert all(0 <= lr_factor(step, cfg, 100) <= 1 for step in range(101))


def test_scheduler_sets_the_rate_of_the_coming_step():
    model = torch.nn.Linear(1, 1)
    cfg = OptimConfig(learning_rate=1e-3, lr_schedule="multistep", milestones=(1,))
    optimizer = build_optimizer(model, cfg)
    scheduler = build_lr_scheduler(optimizer, cfg, max_steps=3)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4])
