"""Pushes a run's voice, and its checkpoints if asked, to the Hub while the run goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback

from tortoise_hf.checkpoint import MANIFEST
from tortoise_hf.config import Config
from tortoise_hf.export import write_companions
from tortoise_hf.hub.checkpoints import push_checkpoints, stage_checkpoints
from tortoise_hf.hub.client import ATTEMPTS, VOICE_MARKER
from tortoise_hf.hub.publish import HUB_DIR, note
from tortoise_hf.hub.push import push_folder
from tortoise_hf.hub.voice_folder import assemble_voice, link_file, local_paths, write_checkpoint_export
from tortoise_hf.models.pretrained import BaseFiles

LAST_PUSH_SECONDS = 600.0
"""How long a run's end waits for the push in flight; the push of the finished voice follows anyway."""


class Pusher:
    """One push at a time, in a thread; of those that wait, only the newest."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        """Report failures through `say`."""
        self.say = say
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._waiting: tuple[Callable[[], None], Callable[[], None]] | None = None

    def submit(self, push: Callable[[], None], discard: Callable[[], None]) -> None:
        """Push as soon as no other push is in flight; `discard` is called when it is over, or overtaken."""
        with self._lock:
            overtaken, self._waiting = self._waiting, (push, discard)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self.thread.start()
        if overtaken is not None:
            overtaken[1]()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self.thread = None
                    return
                (push, discard), self._waiting = self._waiting, None
            try:
                push()
            except Exception as error:  # whatever it is, the run goes on
                self.say(f"\nWarning: {error} The run goes on and pushes again later, at the latest at its end.")
            finally:
                discard()

    def close(self, timeout: float) -> None:
        """Drop what waits, cut short waiting for another try, and let the request in flight end."""
        self.stop.set()
        with self._lock:
            overtaken, self._waiting = self._waiting, None
            thread = self.thread
        if overtaken is not None:
            overtaken[1]()
        if thread is not None:
            thread.join(timeout)


class HubCallback(TrainerCallback):
    """Push from the main process in the background, as `hub.push` says.

    Stands behind `CheckpointCallback`: what is pushed is a checkpoint that is on disk. Its files are linked, so
    rotation can't take them away from a push. The finished voice is pushed after the run, see `push_at_end`.
    """

    def __init__(self, cfg: Config, accelerator: Accelerator, files: BaseFiles, attempts: int = ATTEMPTS) -> None:
        """Push a run that started from `files`; `attempts` as in `retry`."""
        self.cfg, self.accelerator, self.files, self.attempts = cfg, accelerator, files, attempts
        self.run_dir = Path(cfg.training.output_dir)
        self.pusher = Pusher()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the files beside the weights in order once: later only files are linked."""
        if self.accelerator.is_main_process:
            disable_progress_bars()
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
        """Hand the checkpoint just written to the thread, if it is to be pushed."""
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
            for name in ("model.safetensors", "config.json"):
                link_file(checkpoint / name, staging / "checkpoint" / name)
        if hub.checkpoint_repo_id is not None:
            kept = {checkpoint.name, state.best_model_checkpoint or checkpoint.name}
            stage_checkpoints(self.run_dir, kept, staging / "resume")
        evaluations = [dict(entry) for entry in state.log_history if "eval_loss" in entry]
        self.pusher.submit(
            lambda: self._push(staging, step, evaluations, push_voice),
            lambda: shutil.rmtree(staging, ignore_errors=True),
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The finished voice is pushed next; a push of an older one must not come after it."""
        # A checkpoint that is owed still goes out: the voice is pushed again after the run, checkpoints are not.
        if self.cfg.hub.checkpoint_repo_id is not None and self.pusher.thread is not None:
            self.pusher.thread.join(LAST_PUSH_SECONDS)
        self.pusher.close(LAST_PUSH_SECONDS)

    def _push(self, staging: Path, step: int, evaluations: list[dict[str, Any]], push_voice: bool) -> None:
        settings, hub = self.cfg.to_dict(), self.cfg.hub
        options = {"attempts": self.attempts, "wait": self.pusher.stop.wait}
        paths = local_paths(settings, self.run_dir)
        if hub.checkpoint_repo_id is not None:
            push_checkpoints(staging / "resume", hub.checkpoint_repo_id, step, local_paths=paths, **options)
        if not push_voice:
            return
        summary = {"settings": settings, "evaluations": evaluations, "lineage": list(self.files.lineage)}
        write_checkpoint_export(
            staging / "checkpoint", staging / "export", self.run_dir / HUB_DIR / "companions", step, summary
        )
        folder = assemble_voice(staging / "export", staging / "voice", self.run_dir, hub)
        try:
            pushed = push_folder(
                folder,
                hub.repo_id,
                message=f"Voice of step {step}",
                marker=VOICE_MARKER,
                private=hub.private,
                revision=hub.revision,
                local_paths=paths,
                **options,
            )
        except Exception as error:
            note(self.run_dir, hub.repo_id, step, pending=str(error))
            raise
        note(self.run_dir, hub.repo_id, step, pushed)
