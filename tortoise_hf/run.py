"""The run's folder: whether it may be used, where to go on, and what to tell the user at the start and at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerState
from transformers.trainer_callback import ExportableState, TrainerCallback

from tortoise_hf.checkpoint import Checkpoint, find_damage, newest_sound_checkpoint
from tortoise_hf.config import Config
from tortoise_hf.errors import UserError

RUN_FILE = "run.json"
EXPORT_DIR = "export"
METER = "log_interval"
"""Where a saved state keeps the figures of a log interval that isn't over."""
FIXED_SETTINGS = ("data.padding", "data.num_conditioning_clips", "data.conditioning_seconds", "model.base",
                  "model.from_scratch", "training.batch_size", "training.seed")  # fmt: skip
"""Settings a run can't change half-way without becoming another run. Micro-batch size, processes, learning rate and
length may change."""


@dataclass(frozen=True)
class Run:
    """A run's folder, ready to be written to."""

    output_dir: Path
    checkpoint: Checkpoint | None
    """Where to go on; None begins at step 0."""
    finished_step: int | None
    """Last step of a run that ended by itself; None if it is under way."""


def fingerprint(clip_ids: Iterable[str], num_samples: Iterable[int]) -> str:
    """Short hash of which clips a run trains on, in order."""
    digest = hashlib.sha256()
    for clip_id, samples in zip(clip_ids, num_samples, strict=True):
        digest.update(f"{clip_id}\0{samples}\n".encode())
    return digest.hexdigest()[:16]


def open_run(cfg: Config, data_fingerprint: str, max_steps: int, warn: Callable[[str], None] = print) -> Run:
    """Look at the run's folder and decide where to begin. Reads only.

    Raises:
        UserError: if the folder holds something else, if `training.resume: never` meets a run, or if settings or data
            changed so that going on would not continue that run.
    """
    output_dir = Path(cfg.training.output_dir)
    resume = cfg.training.resume
    if resume not in ("auto", "never"):
        return Run(output_dir, _named_checkpoint(Path(resume)), None)
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return Run(output_dir, None, None)
    record_path = output_dir / RUN_FILE
    if not output_dir.is_dir() or not record_path.is_file():
        raise UserError(
            f"training.output_dir {output_dir} holds files but no {RUN_FILE}, so it is not the folder of a run. Name "
            "another folder, or empty this one."
        )
    if resume == "never":
        raise UserError(
            f"{output_dir} holds a run and training.resume is never. Name another training.output_dir, or take "
            "training.resume auto to go on with it."
        )
    record = json.loads(record_path.read_text(encoding="utf-8"))
    _refuse_changes(cfg, record, data_fingerprint, output_dir)
    finished = record.get("finished_step") if record.get("max_steps") == max_steps else None
    return Run(output_dir, newest_sound_checkpoint(output_dir, warn), finished)


def _named_checkpoint(path: Path) -> Checkpoint:
    problem = find_damage(path) if path.is_dir() else "there is no such folder"
    if problem is not None:
        raise UserError(f"training.resume {path} is not a sound checkpoint: {problem}. Name a folder checkpoint-STEP.")
    return Checkpoint(path, json.loads((path / "trainer_state.json").read_text())["global_step"])


def _refuse_changes(cfg: Config, record: dict[str, Any], data_fingerprint: str, output_dir: Path) -> None:
    now, then = cfg.to_dict(), record["config"]
    for key in FIXED_SETTINGS:
        section, name = key.split(".")
        if now[section][name] != then[section][name]:
            raise UserError(
                f"{output_dir} was begun with {key} {then[section][name]}, and now it is {now[section][name]}; the run "
                "can't go on like that. Set it back, or name another training.output_dir."
            )
    if data_fingerprint != record["data_fingerprint"]:
        raise UserError(
            f"{output_dir} was begun with {record['num_train_clips']:,} training clips that are not the ones found "
            "now; the run can't go on with other clips. Bring the data back, or name another training.output_dir."
        )


def write_run(
    run: Run, cfg: Config, data_fingerprint: str, num_train_clips: int, max_steps: int, finished_step: int | None = None
) -> None:
    """Store what `open_run` will compare with; the main process calls it at the start and at the end."""
    record = {
        "config": cfg.to_dict(),
        "data_fingerprint": data_fingerprint,
        "num_train_clips": num_train_clips,
        "max_steps": max_steps,
        "finished_step": finished_step,
    }
    run.output_dir.mkdir(parents=True, exist_ok=True)
    temporary = run.output_dir / f".{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(run.output_dir / RUN_FILE)


def fresh_state(cfg: Config, accelerator: Accelerator, max_steps: int) -> TrainerState:
    """Counters of a run that begins."""
    return mark_process(TrainerState(), cfg, accelerator, max_steps)


def mark_process(state: TrainerState, cfg: Config, accelerator: Accelerator, max_steps: int) -> TrainerState:
    """Fill in what a state takes from the settings and the process rather than from a checkpoint."""
    state.max_steps = max_steps
    state.num_train_epochs = cfg.training.num_train_epochs
    state.logging_steps = cfg.training.logging_steps
    state.eval_steps = cfg.training.eval_steps
    state.save_steps = cfg.training.save_steps
    state.train_batch_size = cfg.training.micro_batch_size
    state.is_world_process_zero = accelerator.is_main_process
    state.is_local_process_zero = accelerator.is_local_main_process
    return state


def remember_callbacks(state: TrainerState, callbacks: list[TrainerCallback], interval: dict[str, Any]) -> None:
    """Put the memory of callbacks (early stopping's patience, say) and the unfinished log interval into the state."""
    state.stateful_callbacks = {
        type(callback).__name__: callback.state() for callback in callbacks if isinstance(callback, ExportableState)
    }
    state.stateful_callbacks[METER] = interval


def restore_callbacks(state: TrainerState, callbacks: list[TrainerCallback]) -> None:
    """Give callbacks the memory a checkpoint kept for them."""
    for callback in callbacks:
        for name, value in state.stateful_callbacks.get(type(callback).__name__, {}).get("attributes", {}).items():
            setattr(callback, name, value)
