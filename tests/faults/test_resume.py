"""A run killed and started again ends as one left alone: bit for bit, on 1 and 2 processes, sharded."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from conftest import make_config
from safetensors.torch import load_file
from transformers import TrainerCallback

from faults.harness import log_of, run, start
from faults.tiny import train_tiny

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block",
}


def config_of(folder, **settings):
    defaults = {
        "data__num_conditioning_clips": 2,
        "training__output_dir": str(folder),
        "training__max_steps": 7,
        "training__micro_batch_size": 1,  # two micro-batches per process and step, at two processes
        "training__eval_batch_size": 4,
        "training__logging_steps": 2,
        "training__save_steps": 2,
        "training__eval_steps": 4,
        "callbacks__progress": False,
        "callbacks__early_stopping_patience": 50,
    }
    return make_config(folder.parent, **{**defaults, **settings})


class KillAfter(TrainerCallback):
    """Kills its process, or all of them, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_after_5(parts):
    parts["callbacks"].insert(0, KillAfter(5))


def files_of(checkpoint):
    (path,) = checkpoint.glob("*model.safetensors")  # of an adapter's run, adapter_model.safetensors
    weights = load_file(path)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    rng = torch.load(checkpoint / "rng.pt", weights_only=True)
    return weights, optimizer, rng


def assert_equal_checkpoints(one, two, moments=50):
    for name in ("scheduler.json",):
        assert (one / name).read_text() == (two / name).read_text()
    (w1, o1, r1), (w2, o2, r2) = files_of(one), files_of(two)
    assert w1.keys() == w2.keys()
    assert all(torch.equal(w1[key], w2[key]) for key in w1)
    assert o1["state"].keys() == o2["state"].keys()
    assert len(o1["state"]) > moments
    assert all(torch.equal(o1["state"][i][key], o2["state"][i][key]) for i in o1["state"] for key in o1["state"][i])
    assert len(r1) == len(r2)
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(r1, r2, strict=True))


@pytest.mark.parametrize(
    ("kind", "processes", "rank"), [("plain", 1, 0), ("DDP", 2, 0), ("FSDP2", 2, 0), ("FSDP2", 2, 2)]
)
def test_killed_and_resumed_equals_unbroken(tmp_path, kind, processes, rank):
    settings = {"lora__rank": rank}
    env = FSDP if kind == "FSDP2" else None
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    results = run(tmp_path / "1", train_tiny, config_of(whole, **settings), num_processes=processes, env=env)
    assert results[0]["kind"] == {"plain": "NO", "DDP": "MULTI_CPU", "FSDP2": "FSDP"}[kind]
    killed = start(
        tmp_path / "2", train_tiny, config_of(broken, **settings), 9, kill_after_5, num_processes=processes, env=env
    )
    assert killed.wait() == [-signal.SIGKILL] * processes
    assert not (broken / "checkpoint-7").exists()
    resumed = run(tmp_path / "3", train_tiny, config_of(broken, **settings), num_processes=processes, env=env)
    moments = 15 if rank else 50
    assert_equal_checkpoints(whole / "checkpoint-7", broken / "checkpoint-7", moments)
    assert log_of(broken) == log_of(whole)
    for one, two in zip(results, resumed, strict=True):
        assert torch.equal(one["random"], two["random"])


def test_checkpoints_that_a_killed_process_left_are_deleted_though_no_step_is_to_be_done(tmp_path):
    folder = tmp_path / "run"
    run(tmp_path / "1", train_tiny, config_of(folder, training__save_total_limit=9))
    assert len(list(folder.glob("checkpoint-*"))) > 2
    result = run(tmp_path / "2", train_tiny, config_of(folder, training__save_total_limit=1))[0]
    best = [entry for entry in result["state"] if "eval_loss" in entry]
    best = min((entry for entry in best if entry["step"] > 0), key=lambda entry: entry["eval_loss"])
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-7", f"checkpoint-{best['step']}"}


class KillAtTheEnd(TrainerCallback):
    """Kills its process after the last step is saved and before it is logged."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_the_end(parts):
    parts["callbacks"].append(KillAtTheEnd())


def test_killed_between_the_last_save_and_its_log_line(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tmp_path / "1", train_tiny, config_of(whole))
    killed = start(tmp_path / "2", train_tiny, config_of(broken), 9, kill_at_the_end)
    assert killed.wait() == [-signal.SIGKILL]
    run(tmp_path / "3", train_tiny, config_of(broken))
    assert log_of(broken) == log_of(whole)
