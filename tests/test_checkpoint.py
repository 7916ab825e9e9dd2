import json
import os

import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from tortoise_hf import checkpoint as checkpoint_module
from tortoise_hf.checkpoint import (
    Checkpoint,
    complete_checkpoints,
    find_damage,
    load_checkpoint,
    newest_sound_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from tortoise_hf.config import OptimConfig
from tortoise_hf.errors import UserError
from tortoise_hf.optim import build_lr_scheduler, build_optimizer


@pytest.fixture
def parts():
    accelerator, model = Accelerator(cpu=True), golden_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_lr_scheduler(optimizer, OptimConfig(), max_steps=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    return accelerator, model, optimizer, scheduler


def save_at(tmp_path, parts, step):
    return save_checkpoint(tmp_path, *parts, TrainerState(global_step=step, best_metric=1.25))


def test_loading_brings_everything_back(tmp_path, parts):
    path = save_at(tmp_path, parts, 5)
    expected_draw = torch.rand(3)
    _, model, optimizer, scheduler = parts
    weights = {name: p.clone() for name, p in model.named_parameters()}
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    rate = scheduler.get_last_lr()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer.state.clear()
    scheduler.step()
    state = load_checkpoint(Checkpoint(path, 5), *parts)
    assert (state.global_step, state.best_metric) == (5, 1.25)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert scheduler.get_last_lr() == rate
    assert torch.equal(torch.rand(3), expected_draw)


def test_changed_settings_of_the_optimizer_count_from_the_next_step_on(tmp_path, parts):
    accelerator, model, *before = parts
    path = save_at(tmp_path, (accelerator, model, *before), 5)
    changed = OptimConfig(learning_rate=4e-4, lr_schedule="linear", weight_decay=0.5, beta1=0.8, eps=1e-6)
    optimizer = build_optimizer(model, changed)
    scheduler = build_lr_scheduler(optimizer, changed, max_steps=10)
    load_checkpoint(Checkpoint(path, 5), accelerator, model, optimizer, scheduler)
    found = [(group["lr"], group["weight_decay"], group["betas"][0], group["eps"]) for group in optimizer.param_groups]
    assert found == [(pytest.approx(3.6e-4), decay, 0.8, 1e-6) for decay in (0.5, 0.0)]  # one step of ten is done
    assert scheduler.get_last_lr() == [pytest.approx(3.6e-4)] * 2
    assert len(optimizer.state) == len(before[0].state)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3.2e-4)


def test_weights_of_compiled_blocks_are_found(tmp_path, parts):
    path, model = save_at(tmp_path, parts, 5), parts[1]
    weights = load_file(path / "model.safetensors")
    save_file(
        {name.replace("gpt.h.", "gpt.h._orig_mod."): t for name, t in weights.items()}, path / "model.safetensors"
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_checkpoint(Checkpoint(path, 5), *parts)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, parts, file, damage):
    older, newer = save_at(tmp_path, parts, 5), save_at(tmp_path, parts, 6)
    target = newer / file
    content = bytearray(target.read_bytes())
    if damage == "truncate":
        target.write_bytes(content[:-7])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    else:
        target.unlink()
    warnings = []
    assert newest_sound_checkpoint(tmp_path, warnings.append) == Checkpoint(older, 5)
    assert file in warnings[0]


def test_a_save_that_fails_leaves_the_older_one(tmp_path, parts, monkeypatch):
    older = save_at(tmp_path, parts, 5)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        save_at(tmp_path, parts, 6)
    assert complete_checkpoints(tmp_path) == [Checkpoint(older, 5)]
    assert find_damage(older) is None
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_a_process_killed_while_writing_leaves_no_checkpoint(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_write_manifest", lambda folder: os._exit(9))
    if (child := os.fork()) == 0:
        save_at(tmp_path, parts, 6)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert complete_checkpoints(tmp_path) == []


def test_rotation_keeps_the_newest_and_the_best(tmp_path, parts):
    for step in (1, 2, 3, 4, 10):
        save_at(tmp_path, parts, step)
    rotate_checkpoints(tmp_path, keep_last=2, keep={"checkpoint-2"})
    assert [c.step for c in complete_checkpoints(tmp_path)] == [10, 4, 2]


def test_pickles_with_code_are_not_run(tmp_path, parts):
    path = save_at(tmp_path, parts, 5)

    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    torch.save(Evil(), path / "optimizer.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_checkpoint(Checkpoint(path, 5), *parts)


def test_the_manifest_lists_every_file(tmp_path, parts):
    path = save_at(tmp_path, parts, 5)
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    assert listed == set(os.listdir(path)) - {"manifest.json"}
