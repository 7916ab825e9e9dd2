"""Signals under `accelerate launch`: the step is saved, nobody is left behind, and the same command ends the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faults.harness import log_of, run, start
from faults.kills import flags, train_script
from faults.test_resume import FSDP

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(repository, config, argv, *, processes=1, **popen):
    """Start `accelerate launch` as a shell would: in a process group of its own."""
    command = [*LAUNCH, "--config_file", str(repository / config), "--main_process_port", "0"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", str(repository / "scripts" / "train.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*command, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=repository,
        start_new_session=True, **popen,
    )  # fmt: skip


def finish(process, timeout=120):
    """Output and exit code."""
    try:
        return process.communicate(timeout=timeout)[0], process.returncode
    finally:
        process.kill()


def processes_with(word):
    """Processes whose command line names a folder of this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def _leave_no_process(tmp_path):
    """A test that fails half-way must not leave a run of 100,000 steps behind."""
    yield
    for pid in processes_with(str(tmp_path)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=200):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it didn't come to that"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("config", "processes", "number", "to_group"),
    [
        ("configs/accelerate/cpu.yaml", 1, signal.SIGINT, True),  # Ctrl-C in a terminal reaches launcher and run
        ("configs/accelerate/cpu.yaml", 1, signal.SIGTERM, False),  # a scheduler's `kill` reaches the launcher alone
        ("configs/accelerate/fsdp2.yaml", 2, signal.SIGINT, True),
    ],
)
def test_a_signal_under_accelerate_launch(
    repository, tiny_base, tiny_voice, tmp_path, config, processes, number, to_group
):
    argv = flags(
        tiny_base, tiny_voice(10), tmp_path, tmp_path / "run", training__max_steps=100_000, training__save_steps=50_000,
        training__eval_strategy="no", optim__lr_schedule="constant",
    )  # fmt: skip
    process = launch(repository, config, argv, processes=processes)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2)
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, code = finish(process)
    assert code != 0
    assert ("share the weights out (FSDP2)" in output) == ("fsdp2" in config)
    wait_for(lambda: not processes_with(str(tmp_path)), 30)
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert 3 < step < 100_000
    assert len(torch.load(saved / "rng.pt", weights_only=True)) == processes
    assert "Finishing this step, then saving" in output
    assert "the step is saved" in output


def test_sharded_processes_write_what_one_process_writes(tiny_base, tiny_voice, tmp_path):
    """The same losses, checkpoint and exported file from 1 process, from 2, and from 2 that share the weights out."""
    data = tiny_voice(11)
    runs = {"cpu": (1, None), "multi_gpu": (2, None), "fsdp2": (2, FSDP)}
    for name, (processes, env) in runs.items():
        argv = flags(tiny_base, data, tmp_path, tmp_path / name, training__max_steps=6, training__logging_steps=1)
        run(tmp_path / "processes", train_script, argv, num_processes=processes, env=env)
        output = (tmp_path / "processes" / "out-0.txt").read_text()
        assert f"Machine: {processes} process" in output
        assert ("FSDP2" in output) == (name == "fsdp2")
    one = log_of(tmp_path / "cpu")
    files = {name: load_file(tmp_path / name / "export" / "model.safetensors") for name in runs}
    headers = {name: header_of(tmp_path / name / "export" / "model.safetensors") for name in runs}
    moments = torch.load(tmp_path / "cpu" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    for name in ("multi_gpu", "fsdp2"):
        for entry, expected in zip(log_of(tmp_path / name), one, strict=True):
            assert entry == pytest.approx(expected, abs=1e-4)
        assert headers[name] == headers["cpu"]  # names, order, shapes and types of the tensors
        for key, tensor in files["cpu"].items():
            torch.testing.assert_close(files[name][key], tensor, atol=1e-3, rtol=0)
        other = torch.load(tmp_path / name / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
        assert other.keys() == moments.keys()
        assert all(other[i]["exp_avg"].shape == moments[i]["exp_avg"].shape for i in moments)
    # A sharded run goes on in one process.
    argv = flags(tiny_base, data, tmp_path, tmp_path / "fsdp2", training__max_steps=8)
    run(tmp_path / "processes", train_script, argv)
    output = (tmp_path / "processes" / "out-0.txt").read_text()
    assert "was saved by 2 process(es) and now there are 1" in output
    assert (tmp_path / "fsdp2" / "checkpoint-8").is_dir()


def header_of(path):
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_deepspeed_is_refused_in_a_sentence(tiny_base, tiny_voice, tmp_path):
    argv = flags(tiny_base, tiny_voice(2), tmp_path, tmp_path / "run")
    started = start(tmp_path / "processes", train_script, argv, env={"ACCELERATE_USE_DEEPSPEED": "true"})
    assert started.wait() == [1]
    assert "accelerate was told to use DeepSpeed" in started.output()
    assert "configs/accelerate/fsdp2.yaml" in started.output()
    assert "Traceback" not in started.output()
