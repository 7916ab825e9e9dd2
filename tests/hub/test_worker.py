"""Pushes while training: the process they run in, when it ends, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hub.voice_maker import CONSENT, make_run

from tortoise_hf.callbacks.hub import Pusher
from tortoise_hf.hub.publish import HUB_DIR, NOTE

FILES = ("model.safetensors", "config.json", "trainer_state.json", "manifest.json")


@pytest.fixture
def run(tmp_path, tiny_base):
    folder = make_run(tmp_path, tiny_base, hub__repo_id="me/voice", hub__consent=CONSENT)
    companions = folder / HUB_DIR / "companions"
    companions.mkdir(parents=True)
    for name in ("tokenizer.json", "mel_norms.safetensors"):
        shutil.copyfile(folder / "export" / name, companions / name)
    return folder


def stage(run, name="step-5"):
    staging = run / HUB_DIR / name
    (staging / "checkpoint").mkdir(parents=True)
    for file in FILES:
        os.link(run / "checkpoint-5" / file, staging / "checkpoint" / file)
    (staging / "step.json").write_text(json.dumps({"step": 5, "lineage": ["random weights"]}))
    return staging


def start(run, staging):
    return subprocess.Popen(
        [sys.executable, "-m", "tortoise_hf.hub.worker", str(run), str(staging)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_it_ignores_the_runs_signals_and_leaves_with_it(hub, run):
    reached, go_on = threading.Event(), threading.Event()

    def hold(request):
        reached.set()
        go_on.wait(200)

    hub.fail("POST", "/commit/", hold)
    process = start(run, stage(run))
    assert reached.wait(200)
    process.send_signal(signal.SIGINT)  # Ctrl-C reaches every process of a terminal
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.stdin.close()  # as when the run is killed
    assert process.wait(20) == 1
    assert hub.repository("me/voice").titles() == ["initial commit"]
    go_on.set()


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="this system has no niceness")
def test_it_gives_way_to_the_run(hub, run):
    pusher = Pusher(run)
    pusher.submit(stage(run))
    child = wait_for_push()
    assert child.nice() == 19
    pusher.close(0)  # no patience: it is killed
    assert not child.is_running()


def wait_for_push():
    """The pushing process, as soon as it is there."""
    while True:
        for child in psutil.Process().children():
            if "tortoise_hf.hub.worker" in child.cmdline():
                return child
        time.sleep(0.01)


def test_when_the_run_is_over_there_are_no_more_tries(hub, run, monkeypatch):
    monkeypatch.setattr("tortoise_hf.callbacks.hub.NICENESS", 0)
    hub.broken["me/voice"] = 503
    said = []
    pusher = Pusher(run, said.append)
    waiting = [stage(run, "step-5"), stage(run, "step-6"), stage(run, "step-7")]
    pusher.submit(waiting[0])
    wait_for_push()
    for staging in waiting[1:]:
        pusher.submit(staging)
    assert not waiting[1].exists()  # overtaken by the third while the first is in flight
    pusher.close(250)
    assert len(said) == 1
    assert "503" in said[0]
    assert "The run goes on and pushes again later" in said[0]
    assert "503" in json.loads((run / NOTE).read_text())["pending"]
    assert not any(staging.exists() for staging in waiting)
