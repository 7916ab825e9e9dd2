"""Pushes a run's voice, and its checkpoints if asked, to the Hub while the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from tortoise_hf.adapter_files import ADAPTER_FILES, is_adapter
from tortoise_hf.checkpoint import MANIFEST
from tortoise_hf.config import Config, HubConfig
from tortoise_hf.export import write_companions
from tortoise_hf.hub.checkpoints import stage_checkpoints
from tortoise_hf.hub.publish import HUB_DIR
from tortoise_hf.hub.voice_folder import link_file
from tortoise_hf.models.pretrained import BaseFiles

NICENESS = 19
"""Of a push, where the system has such a thing: it takes what the run leaves, and 1.5 % of a processor that the run
keeps busy (Linux's weights of nice 19 and 0: 15 and 1024)."""
LAST_PUSH_SECONDS = 600.0
"""How long a run's end waits for the push in flight; the push of the finished voice follows anyway."""

_DEATH_SECONDS = 30.0  # a killed process may still have to come back from the disk


def held_by_pushes(hub: HubConfig) -> tuple[int, int]:
    """(files of weights, checkpoints) that pushes keep from being deleted at most, for `check_space`.

    One push is in flight and one waits. A voice in flight is the weights twice, as safetensors and in the published
    layout; one that waits is only the former. An adapter alone takes next to nothing. Checkpoints that are pushed are
    the newest and the best.
    """
    voices = hub.repo_id is not None and hub.push != "end" and not hub.adapter_only
    return (3 if voices else 0, 4 if hub.checkpoint_repo_id is not None else 0)


class Pusher:
    """One push at a time, each in a process of its own (`hub/worker.py`); of those that wait, only the newest."""

    def __init__(self, run_dir: Path, say: Callable[[str], None] = print) -> None:
        """Push what lies in folders of `run_dir`; report failures through `say`."""
        self.run_dir, self.say = run_dir, say
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._waiting: Path | None = None
        self._closed = False

    def submit(self, staging: Path) -> None:
        """Push a folder as soon as no other push is in flight; it is deleted when that is over, or overtaken."""
        with self._lock:
            overtaken, self._waiting = self._waiting, staging
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()
        if overtaken is not None:
            shutil.rmtree(overtaken, ignore_errors=True)

    def is_busy(self) -> bool:
        """Whether something is in flight or waits."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait for what is in flight and what waits."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def close(self, timeout: float) -> None:
        """Drop what waits, cut short waiting for another try, and let the request in flight end, if it does in time."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                with contextlib.suppress(BrokenPipeError):  # it is over
                    self._process.stdin.write("stop\n")
                    self._process.stdin.flush()
        self.join(timeout)
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self.join(_DEATH_SECONDS)

    def _work(self) -> None:
        while True:
            with self._lock:
                staging, self._waiting = self._waiting, None
                if staging is None:
                    self._thread = None
                    return
            problem = self._push(staging)
            if problem is not None:
                self.say(f"\nWarning: {problem} The run goes on and pushes again later, at the latest at its end.")
            shutil.rmtree(staging, ignore_errors=True)

    def _push(self, staging: Path) -> str | None:
        """What went wrong, in a sentence; None if nothing did."""
        try:
            with self._lock:
                if self._closed:
                    return None
                process = self._process = self._start(staging)
            # Not communicate(): it would close the input, which tells the process to leave.
            said, code = process.stdout.read(), process.wait()
            with self._lock:
                self._process = None
                process.stdin.close()
                process.stdout.close()
        except OSError as error:
            return f"The pushing process could not be started ({error})."
        return None if code == 0 else (said.strip().splitlines() or [f"The push ended with exit code {code}."])[-1]

    def _start(self, staging: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tortoise_hf.hub.worker", str(self.run_dir), str(staging)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # The graphics memory is the run's, and nobody would see the bars.
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process


class HubCallback(TrainerCallback):
    """Push from the main process in the background, as `hub.push` says.

    Stands behind `CheckpointCallback`: what is pushed is a checkpoint that is on disk. Its files are linked, so
    rotation can't take them away from a push. The finished voice is pushed after the run, see `push_at_end`.
    """

    def __init__(self, cfg: Config, accelerator: Accelerator, files: BaseFiles) -> None:
        """Push a run that started from `files`."""
        self.cfg, self.accelerator, self.files = cfg, accelerator, files
        self.run_dir = Path(cfg.training.output_dir)
        self.pusher = Pusher(self.run_dir)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the files beside the weights in order once: later only files are linked."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.run_dir / HUB_DIR, ignore_errors=True)  # of a run that was killed
            companions = self.run_dir / HUB_DIR / "companions"
            companions.mkdir(parents=True)
            with torch.random.fork_rng(devices=[]):
                write_companions(companions, self.files)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Where every evaluation is pushed, it needs a checkpoint."""
        if self.cfg.hub.repo_id is not None and self.cfg.hub.push == "every_eval" and state.global_step > 0:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the checkpoint just written on, if it is to be pushed."""
        if not self.accelerator.is_main_process:
            return
        hub, step = self.cfg.hub, state.global_step
        checkpoint = self.run_dir / f"checkpoint-{step}"
        evaluated = any(entry["step"] == step and "eval_loss" in entry for entry in state.log_history)
        wanted = {"end": False, "best": state.best_global_step == step, "checkpoint": True, "every_eval": evaluated}
        push_voice = hub.repo_id is not None and wanted[hub.push]
        if not (checkpoint / MANIFEST).is_file() or not (push_voice or hub.checkpoint_repo_id):
            return
        staging = self.run_dir / HUB_DIR / f"step-{step}"
        shutil.rmtree(staging, ignore_errors=True)
        if push_voice:
            weights = ADAPTER_FILES if is_adapter(checkpoint) else ("model.safetensors",)
            for name in (*weights, "config.json", "trainer_state.json", MANIFEST):
                link_file(checkpoint / name, staging / "checkpoint" / name)
        if hub.checkpoint_repo_id is not None:
            kept = {checkpoint.name, state.best_model_checkpoint or checkpoint.name}
            stage_checkpoints(self.run_dir, kept, staging / "resume")
        told = {"step": step, "lineage": list(self.files.lineage)}
        (staging / "step.json").write_text(json.dumps(told), encoding="utf-8")
        self.pusher.submit(staging)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The finished voice is pushed next; a push of an older one must not come after it."""
        # A checkpoint that is owed still goes out: the voice is pushed again after the run, checkpoints are not.
        self.send_what_is_owed()
        self.pusher.close(LAST_PUSH_SECONDS)

    def send_what_is_owed(self) -> None:
        """Wait for the push of the newest checkpoint, if such pushes were asked for."""
        if self.cfg.hub.checkpoint_repo_id is not None and self.pusher.is_busy():
            place = self.cfg.hub.checkpoint_repo_id
            print(f"Waiting for the checkpoint to reach {place}; Ctrl-C leaves without.", flush=True)
            self.pusher.join(LAST_PUSH_SECONDS)
