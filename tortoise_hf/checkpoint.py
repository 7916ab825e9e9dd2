"""Checkpoints: written whole or not at all, verified when read, rotated, found again.

A checkpoint is a folder `checkpoint-STEP` in the run's folder with the model, the optimizer, the schedule, the state of
the run and of every process's random numbers, and a manifest with the size and sha256 of each file. It is written under
a temporary name, flushed to disk and renamed, so a run killed in the middle leaves the older ones untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from tortoise_hf.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
METER = "log_interval"
"""Where a saved state keeps the figures of a log interval that isn't over."""
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int


def save_checkpoint(
    output_dir: Path,
    accelerator: Accelerator,
    model: Any,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: TrainerState,
) -> Path:
    """Write `checkpoint-<global_step>`; every process calls it, the main one writes.

    Args:
        output_dir: the run's folder.
        accelerator: gathers the processes' random states.
        model: the unwrapped model.
        optimizer: its state is stored in full.
        lr_scheduler: likewise.
        state: counters, best metric and log of the run.

    Raises:
        UserError: if the disk is full or the folder can't be written; older checkpoints stay as they are.
    """
    rng_states = gather_object([_rng_state()])
    final = output_dir / f"checkpoint-{state.global_step}"
    if accelerator.is_main_process:
        staging = output_dir / f".{final.name}.{os.getpid()}.tmp"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            model.save_pretrained(staging)
            torch.save(optimizer.state_dict(), staging / "optimizer.pt")
            torch.save(rng_states, staging / "rng.pt")
            _write_json(staging / "scheduler.json", lr_scheduler.state_dict())
            if accelerator.scaler is not None:
                _write_json(staging / "scaler.json", accelerator.scaler.state_dict())
            state.save_to_json(str(staging / "trainer_state.json"))
            _write_manifest(staging)
            if final.exists():
                shutil.rmtree(final)
            staging.rename(final)
            _sync(output_dir)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(
                f"{final} could not be written ({error.strerror or error}); earlier checkpoints in {output_dir} are "
                "untouched. Free some space or choose another training.output_dir, then run the same command again."
            ) from error
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    model: Any,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> TrainerState:
    """Put a run back to where `checkpoint` was saved; every process calls it.

    Returns:
        The state the run goes on with. Random states are set; draw nothing before the next step.
    """
    path = checkpoint.path
    model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    lr_scheduler.load_state_dict(json.loads((path / "scheduler.json").read_text()))
    scaler_path = path / "scaler.json"
    if accelerator.scaler is not None and scaler_path.exists():
        accelerator.scaler.load_state_dict(json.loads(scaler_path.read_text()))
    rng_states = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
    if accelerator.process_index < len(rng_states):
        _set_rng_state(rng_states[accelerator.process_index])
    return TrainerState.load_from_json(str(path / "trainer_state.json"))


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


def complete_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Checkpoints of a run that have their manifest, newest first; their contents are not read yet."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = _NAME.match(path.name)
        if match and (path / MANIFEST).is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def newest_sound_checkpoint(output_dir: Path, warn: Any = print) -> Checkpoint | None:
    """The newest checkpoint whose files are what the manifest says; damaged ones are named through `warn`."""
    for checkpoint in complete_checkpoints(output_dir):
        problem = find_damage(checkpoint.path)
        if problem is None:
            return checkpoint
        warn(f"{checkpoint.path} is damaged ({problem}); it is left alone and an older one is used.")
    return None


def find_damage(path: Path) -> str | None:
    """What differs between a checkpoint's files and its manifest, in words; None if nothing does."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, record in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != record["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {record['bytes']:,}"
            if _sha256(file) != record["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read: {error}"
    return None


def rotate_checkpoints(output_dir: Path, keep_last: int, keep: set[str]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those named in `keep`."""
    for checkpoint in complete_checkpoints(output_dir)[keep_last:]:
        if checkpoint.path.name not in keep:
            # Renamed first: a deletion that is cut short must not leave half a checkpoint under a checkpoint's name.
            doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.old.tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    records = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    _write_json(folder / MANIFEST, {"format": FORMAT, "files": records})
    for path in [*files, folder / MANIFEST, folder]:
        _sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
