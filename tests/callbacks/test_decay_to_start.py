"""The pull to the weights a run started from: how far it moves them, when, and on several processes."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from faults.harness import run
from faults.test_resume import FSDP, config_of
from faults.tiny import train_tiny
from safetensors.torch import load_file

from tortoise_hf.callbacks import build_callbacks
from tortoise_hf.callbacks.decay_to_start import DecayToStartCallback
from tortoise_hf.callbacks.lr_schedule import LRScheduleCallback
from tortoise_hf.config import OptimConfig
from tortoise_hf.optim import build_lr_scheduler, build_optimizer

CFG = OptimConfig(learning_rate=1e-2, weight_decay=0.1, decay_to_start=20.0, lr_schedule="linear", warmup_steps=0)


def moved_copies(steps, pulled):
    """(start, end) of a small linear layer after steps along its weights, with the callback or without."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    start = [value.detach().clone() for value in layer.parameters()]
    optimizer = build_optimizer(layer, CFG)
    scheduler = build_lr_scheduler(optimizer, CFG, 10)
    callbacks = [DecayToStartCallback(optimizer, CFG.decay_to_start)] if pulled else []
    for _ in range(steps):
        for value in layer.parameters():
            value.grad = torch.ones_like(value)
        optimizer.step()
        for callback in (*callbacks, LRScheduleCallback()):
            callback.on_optimizer_step(None, None, None, optimizer=optimizer, lr_scheduler=scheduler)
    return start, [value.detach() for value in layer.parameters()]


def test_a_step_goes_back_by_learning_rate_times_rate_of_the_way():
    start, plain = moved_copies(1, pulled=False)
    _, pulled = moved_copies(1, pulled=True)
    for begin, free, found in zip(start, plain, pulled, strict=True):  # the bias as well, which has no weight decay
        torch.testing.assert_close(found, begin + (1 - 1e-2 * 20) * (free - begin))


def test_it_goes_by_the_rate_that_each_step_was_taken_with():
    """AdamW's steps have the size of the learning rate when all gradients are alike; biases see nothing else."""
    start, pulled = moved_copies(10, pulled=True)
    moved = 0.0
    for step in range(10):
        rate = 1e-2 * (1 - step / 10)
        moved = (1 - 20 * rate) * (moved - rate)
    torch.testing.assert_close(pulled[1] - start[1], torch.full((2,), moved), rtol=1e-4, atol=1e-7)


def test_it_stands_before_the_schedule_and_is_left_out_where_it_is_off(tmp_path):
    optimizer = build_optimizer(golden_gpt(), OptimConfig())
    kinds = [
        [type(each) for each in build_callbacks(make_config(tmp_path, **settings), Accelerator(cpu=True), optimizer)]
        for settings in ({}, {"optim__decay_to_start": 1.0})
    ]
    assert DecayToStartCallback not in kinds[0]
    assert kinds[1].index(DecayToStartCallback) < kinds[1].index(LRScheduleCallback)


@pytest.mark.parametrize(("kind", "processes"), [("plain", 1), ("DDP", 2), ("FSDP2", 2)])
def test_a_strong_pull_keeps_the_start_on_any_number_of_processes(tmp_path, kind, processes):
    """999 thousandths of the way back after every step leave a thousandth of a learning rate of it, 1e-6."""
    settings = {"optim__decay_to_start": 999.0, "optim__lr_schedule": "constant", "optim__weight_decay": 0.0}
    env = FSDP if kind == "FSDP2" else None
    run(tmp_path / "1", train_tiny, config_of(tmp_path / "run", **settings), num_processes=processes, env=env)
    found, start = load_file(tmp_path / "run" / "checkpoint-7" / "model.safetensors"), golden_gpt().state_dict()
    largest = max(float((found[name] - value).abs().max()) for name, value in start.items())
    assert 1e-7 < largest < 4e-6
