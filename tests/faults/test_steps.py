"""Steps that fail: no memory, NaN, a dead loader worker, a dead process, a clock that runs backwards."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from faults.harness import log_of, run, start
from faults.test_resume import FSDP, KillAfter, assert_equal_checkpoints, config_of, files_of, kill_after_5
from faults.tiny import train_tiny
from tortoise_hf.errors import UserError
from tortoise_hf.faults import in_words


def final_eval(result):
    return [entry["eval_loss"] for entry in result["state"] if "eval_loss" in entry][-1]


# --- memory ---------------------------------------------------------------------------------------------------------


class LimitedMemory:
    """Makes the model fail above a number of rows, as if a device had no room for them."""

    def __init__(self, rows, ranks=(0, 1), backward=False):
        self.rows, self.ranks, self.backward, self.found = rows, ranks, backward, 0

    def __call__(self, parts):
        if parts["accelerator"].process_index not in self.ranks:
            return
        parts["model"].gpt.register_forward_pre_hook(self.count, with_kwargs=True)
        if self.backward:
            parts["model"].mel_head.register_full_backward_pre_hook(self.check)
        else:
            parts["model"].mel_head.register_forward_pre_hook(self.check)

    def count(self, module, args, kwargs):
        self.found = len(kwargs["packing"].row_lengths)

    def check(self, module, values):
        if module.training and self.found > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (pretended)")


def oom_config(folder, **settings):
    return config_of(folder, training__micro_batch_size=4, training__batch_size=4, **settings)


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_halves_micro_batches_and_goes_on(tmp_path, backward):
    """The steps see the same clips; a run killed later goes on with what was found, and ends bit for bit the same."""
    limit = LimitedMemory(rows=1, backward=backward)
    free, whole, broken = tmp_path / "free", tmp_path / "whole", tmp_path / "broken"
    (expected,) = run(tmp_path / "0", train_tiny, oom_config(free, optim__learning_rate=1e-5))
    limited = run(tmp_path / "1", train_tiny, oom_config(whole, optim__learning_rate=1e-5), 9, limit)[0]
    assert limited["micro_batch_size"] == 1
    output = (tmp_path / "1" / "out-0.txt").read_text()
    assert "Step 1: out of memory with micro-batches of 4 clips; the step is done again with 2" in output
    assert "out of memory with micro-batches of 2 clips; the step is done again with 1" in output
    # Dropout falls differently on other micro-batches; at this learning rate that is all that differs.
    losses = [entry["eval_loss"] for entry in limited["state"] if "eval_loss" in entry]
    assert losses == pytest.approx([e["eval_loss"] for e in expected["state"] if "eval_loss" in e], rel=1e-3)

    killed = start(
        tmp_path / "2", train_tiny, oom_config(broken, optim__learning_rate=1e-5), 9, LimitedThenKilled(1, backward)
    )
    assert killed.wait() == [-signal.SIGKILL]
    resumed = run(tmp_path / "3", train_tiny, oom_config(broken, optim__learning_rate=1e-5), 9, limit)[0]
    output = (tmp_path / "3" / "out-0.txt").read_text()
    assert "Micro-batches of 1 clips: at 4 memory had run out." in output
    assert "out of memory with" not in output  # it doesn't run out again
    assert resumed["micro_batch_size"] == 1
    assert_equal_checkpoints(whole / "checkpoint-7", broken / "checkpoint-7")
    assert log_of(broken) == log_of(whole)


class LimitedThenKilled(LimitedMemory):
    def __init__(self, rows, backward):
        super().__init__(rows, backward=backward)

    def __call__(self, parts):
        super().__call__(parts)
        kill_after_5(parts)


def test_one_process_out_of_memory_takes_the_other_along(tmp_path):
    limit = LimitedMemory(rows=1, ranks=(1,), backward=True)
    results = run(tmp_path / "1", train_tiny, oom_config(tmp_path / "run"), 9, limit, num_processes=2)
    assert [result["micro_batch_size"] for result in results] == [1, 1]
    assert results[0]["checkpoints"][-1] == "checkpoint-7"


def test_a_clip_too_large_for_memory_ends_in_a_sentence(tmp_path):
    started = start(tmp_path / "1", train_tiny, oom_config(tmp_path / "run"), 9, LimitedMemory(rows=0))
    assert started.wait() == [1]
    assert "out of memory with a single clip" in started.output()
    assert "gradient_checkpointing" in started.output()
    assert "Traceback" not in started.output()


def test_sharded_processes_say_what_to_set(tmp_path):
    started = start(
        tmp_path / "1", train_tiny, oom_config(tmp_path / "run"), 9, LimitedMemory(rows=1), num_processes=2, env=FSDP
    )
    assert started.wait() == [1, 1]
    assert "Lower training.micro_batch_size to 2" in started.output()
    assert "Traceback" not in started.output()


# --- NaN ------------------------------------------------------------------------------------------------------------


class PoisonedClip:
    """The conditioning of clip 5 or of all clips is NaN."""

    def __init__(self, all_clips):
        self.all_clips = all_clips

    def __call__(self, parts):
        examples = parts["dataset"].examples
        for example in examples if self.all_clips else [examples[5]]:
            example.conditioning_mel[:] = float("nan")


def test_a_nan_clip_is_named_and_its_step_left_out(tmp_path):
    cfg = config_of(tmp_path / "run", training__eval_strategy="no", training__logging_steps=1)
    results = run(tmp_path / "1", train_tiny, cfg, 9, PoisonedClip(all_clips=False), num_processes=2)
    output = (tmp_path / "1" / "out-0.txt").read_text()
    assert "the loss was NaN or infinite, the weights stay as they are. Clips: clip-5." in output
    assert (tmp_path / "1" / "out-1.txt").read_text().count("NaN") == 0  # said once
    weights = load_file(tmp_path / "run" / "checkpoint-7" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert len([entry for entry in results[0]["state"] if "loss" in entry]) == 7  # of the step's other clips
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_nan_in_a_row_stops_with_the_last_good_checkpoint_intact(tmp_path):
    folder = tmp_path / "run"
    run(tmp_path / "1", train_tiny, config_of(folder, training__max_steps=4))
    good = files_of(folder / "checkpoint-4")[0]
    cfg = config_of(folder, training__max_steps=40, training__eval_strategy="no")
    started = start(tmp_path / "2", train_tiny, cfg, 9, PoisonedClip(all_clips=True), num_processes=2)
    assert started.wait() == [1, 1]
    assert "10 steps in a row up to step 14" in started.output()
    newest = max((int(p.name.split("-")[1]), p) for p in folder.glob("checkpoint-*"))[1]
    kept = files_of(newest)[0]
    assert all(torch.equal(good[key], kept[key]) for key in good)


# --- processes ------------------------------------------------------------------------------------------------------


def kill_rank_1(parts):
    if parts["accelerator"].process_index == 1:
        parts["callbacks"].insert(0, KillAfter(3))


@pytest.mark.parametrize("env", [None, FSDP], ids=["DDP", "FSDP2"])
def test_one_of_two_processes_dies(tmp_path, env):
    folder = tmp_path / "run"
    began = time.monotonic()
    started = start(tmp_path / "1", train_tiny, config_of(folder), 9, kill_rank_1, num_processes=2, env=env)
    assert started.wait(60) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    assert "Another process of this run ended or can't be reached" in started.output()
    assert "Traceback" not in started.output()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


class KillWorker(TrainerCallback):
    """Kills the process that collates batches, as a system short of memory does."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)


def kill_worker(parts):
    parts["callbacks"].insert(0, KillWorker())


def test_a_loader_worker_dies(tmp_path):
    cfg = config_of(tmp_path / "run", data__num_workers=1)
    started = start(tmp_path / "1", train_tiny, cfg, 9, kill_worker)
    assert started.wait(60) == [1]
    assert "A process that collates batches died" in started.output()
    assert "Traceback" not in started.output()
    resumed = run(tmp_path / "2", train_tiny, cfg)[0]
    whole = run(tmp_path / "3", train_tiny, config_of(tmp_path / "whole", data__num_workers=1))[0]
    assert resumed["checkpoints"][-1] == "checkpoint-7"
    assert final_eval(resumed) == final_eval(whole)


def test_other_numbers_of_processes_go_on_with_the_same_clips(tmp_path):
    """2 processes, then 1: said, and the losses agree with an unbroken run within what dropout makes of it."""
    quiet = {"optim__learning_rate": 1e-5}
    whole = run(tmp_path / "0", train_tiny, config_of(tmp_path / "whole", **quiet))[0]
    cfg = config_of(tmp_path / "run", **quiet)
    start(tmp_path / "1", train_tiny, cfg, 9, kill_after_5, num_processes=2).wait()
    resumed = run(tmp_path / "2", train_tiny, cfg)[0]
    assert "was saved by 2 process(es) and now there are 1" in (tmp_path / "2" / "out-0.txt").read_text()
    assert final_eval(resumed) == pytest.approx(final_eval(whole), rel=1e-3)
    assert [entry["step"] for entry in resumed["state"]] == [entry["step"] for entry in whole["state"]]
    refused = start(tmp_path / "3", train_tiny, config_of(tmp_path / "run", training__batch_size=2))
    assert refused.wait() == [1]
    assert "was begun with training.batch_size 4, and now it is 2" in refused.output()


# --- time -----------------------------------------------------------------------------------------------------------


def turn_back_the_clock(parts):
    ticks = itertools.count()
    time.time = lambda: 1e9 - 60 * next(ticks)


def test_a_clock_that_runs_backwards(tmp_path):
    whole, odd = tmp_path / "whole", tmp_path / "odd"
    run(tmp_path / "1", train_tiny, config_of(whole))
    killed = start(tmp_path / "2", train_tiny, config_of(odd), 9, BackwardsThenKilled())
    assert killed.wait() == [-signal.SIGKILL]
    os.utime(odd / "checkpoint-4", (0, 0))  # as if the newest had been written in 1970
    run(tmp_path / "3", train_tiny, config_of(odd), 9, turn_back_the_clock)
    assert_equal_checkpoints(whole / "checkpoint-7", odd / "checkpoint-7")
    assert log_of(odd) == log_of(whole)


class BackwardsThenKilled:
    def __call__(self, parts):
        turn_back_the_clock(parts)
        kill_after_5(parts)


def test_a_dead_loader_worker_leaves_no_traceback_at_exit(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with pytest.raises(UserError, match="died"), in_words():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    of_loader = SimpleNamespace(object=torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__del__)
    of_another = SimpleNamespace(object=print)
    sys.unraisablehook(of_loader)
    sys.unraisablehook(of_another)
    assert told == [of_another]
