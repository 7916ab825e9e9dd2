"""Disks that are full, broken or read-only: what was saved stays, and the message has the figures."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import golden_gpt
from transformers import TrainerCallback, TrainerState

from faults.harness import log_of, run, start
from faults.test_resume import assert_equal_checkpoints, config_of
from faults.tiny import train_tiny
from tortoise_hf.callbacks.hub import held_by_pushes
from tortoise_hf.checkpoint import check_space, find_damage, save_checkpoint
from tortoise_hf.config import HubConfig, OptimConfig
from tortoise_hf.errors import UserError
from tortoise_hf.optim import build_lr_scheduler, build_optimizer


def fill_disk_at_4(parts):
    """Something else fills the disk while the run is under way."""

    class Filler(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and state.is_world_process_zero:
                disk = Path(args.output_dir).parent
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "something_else").write_bytes(b"x" * (free - 2_000_000))

    parts["callbacks"].insert(0, Filler())


@pytest.mark.parametrize("processes", [1, 2])
def test_disk_full_during_a_checkpoint(tmp_path, small_disk, processes):
    disk = small_disk("24m")
    cfg = config_of(disk / "run")
    started = start(tmp_path / "1", train_tiny, cfg, 9, fill_disk_at_4, num_processes=processes)
    assert started.wait() == [1] * processes
    assert "checkpoint-4 could not be written" in started.output()
    assert "MB are free there" in started.output()
    assert "Traceback" not in started.output()
    assert sorted(path.name for path in (disk / "run").glob("*checkpoint*")) == ["checkpoint-2"]
    assert find_damage(disk / "run" / "checkpoint-2") is None
    # Room again: the same command ends as if nothing had been.
    (disk / "something_else").unlink()
    run(tmp_path / "2", train_tiny, cfg, num_processes=processes)
    run(tmp_path / "3", train_tiny, config_of(tmp_path / "whole"), num_processes=processes)
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-7", disk / "run" / "checkpoint-7")
    assert log_of(disk / "run") == log_of(tmp_path / "whole")


def test_too_little_space_is_said_before_the_first_step(tmp_path, small_disk):
    disk = small_disk("5m")
    started = start(tmp_path / "1", train_tiny, config_of(disk / "run"))
    assert started.wait() == [1]
    assert "needs 15.6" in started.output()
    assert "training.optimizer_state (full 3." in started.output()
    assert "Traceback" not in started.output()
    assert not (disk / "run" / "log.jsonl").exists()  # not even the first evaluation was done


def test_space_counts_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 30_000_000_000})())
    line = check_space(tmp_path, 421_526_786, "full", keep_last=2)
    assert "Checkpoints: 5.06 GB each" in line
    assert "8bit 2.54 GB, none 1.69 GB" in line
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 20_000_000_000})())
    with pytest.raises(UserError, match=r"needs 23.61 GB more .* 20.00 GB left"):
        check_space(tmp_path, 421_526_786, "full", keep_last=2)
    assert check_space(tmp_path, 421_526_786, "8bit", keep_last=2)
    # A push in flight and one that waits keep weights and checkpoints from being deleted.
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 50_000_000_000})())
    pushing = HubConfig(repo_id="me/voice", push="best")
    assert "checkpoints, export and pushes take up to 28.66 GB" in check_space(
        tmp_path, 421_526_786, "full", 2, *held_by_pushes(pushing)
    )
    assert held_by_pushes(HubConfig(repo_id="me/voice")) == (0, 0)  # the finished voice is the export
    both = held_by_pushes(HubConfig(repo_id="me/voice", push="best", checkpoint_repo_id="me/run"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 48_000_000_000})())
    with pytest.raises(UserError, match=r"needs 48.90 GB more for checkpoints, export and pushes, .* 48.00 GB left"):
        check_space(tmp_path, 421_526_786, "full", 2, *both)


def test_a_file_larger_than_allowed(tmp_path):
    """The same without root: the system refuses to let any file grow, as a quota does."""
    model = golden_gpt()
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_lr_scheduler(optimizer, OptimConfig(lr_schedule="constant", warmup_steps=0), 10)
    parts = (Accelerator(cpu=True), model, optimizer, scheduler)
    save_checkpoint(tmp_path, *parts, TrainerState(global_step=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="checkpoint-2 could not be written"):
            save_checkpoint(tmp_path, *parts, TrainerState(global_step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_read_only_folder(tmp_path, small_disk):
    disk = small_disk("5m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    started = start(tmp_path / "1", train_tiny, config_of(disk / "run"))
    assert started.wait() == [1]
    assert f"training.output_dir {disk / 'run'} can't be written" in started.output()
    assert "Traceback" not in started.output()


def poison_weights(parts):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.mel_head.bias[0] = float("inf")

    parts["callbacks"].insert(0, Poison())


def test_infinite_weights_are_never_saved(tmp_path):
    started = start(tmp_path / "1", train_tiny, config_of(tmp_path / "run"), 9, poison_weights)
    assert started.wait() == [1]
    assert "mel_head.bias holds NaN or infinite values" in started.output()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
