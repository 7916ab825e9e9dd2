"""Checkpoints: written whole or not at all, verified when read, rotated, found again.

A checkpoint is a folder `checkpoint-STEP` in the run's folder with the model (or, where one is trained, the adapter
alone), the optimizer, the schedule, the state of the run and of every process's random numbers, and a manifest with the
size and sha256 of each file. It is written under a temporary name, flushed to disk and renamed, so a run killed in the
middle leaves the older ones untouched.
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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from tortoise_hf.distributed import raise_together, shard_like, to_full
from tortoise_hf.errors import UserError
from tortoise_hf.lora import adapter_names, has_adapter, read_adapter, save_adapter
from tortoise_hf.optimizer_state import STATE_BYTES, OptimizerState, checkpoint_bytes, optimizer_of, pack, unpack

MANIFEST = "manifest.json"
FORMAT = 1
METER = "log_interval"
"""Where a saved state keeps the figures of a log interval that isn't over."""
MICRO_BATCH = "micro_batch_size"
"""Where a saved state keeps the micro-batch size a run fell back to when memory ran out."""
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
    optimizer_state: OptimizerState = "full",
) -> Path:
    """Write `checkpoint-<global_step>`; every process calls it, the main one writes.

    The files don't depend on how many processes trained or whether they shared the weights out.

    Args:
        output_dir: the run's folder.
        accelerator: gathers the processes' random states.
        model: the unwrapped model, sharded or not.
        optimizer: AdamW over the model's weights.
        lr_scheduler: its state is stored.
        state: counters, best metric and log of the run.
        optimizer_state: what to keep of the optimizer, see `optimizer_state.pack`.

    Raises:
        UserError: on every process, if the disk is full, the folder can't be written or a weight is NaN or infinite;
            older checkpoints stay as they are.
    """
    rng_states = gather_object([rng_state()])
    kept = adapter_names(model) if has_adapter(model) else model.state_dict()
    weights = {name: to_full(tensor) for name, tensor in model.state_dict().items() if name in kept}
    moments = _full_optimizer_state(optimizer, keep=accelerator.is_main_process, kind=optimizer_state)
    final = output_dir / f"checkpoint-{state.global_step}"
    problem = None
    if accelerator.is_main_process:
        problem = _problem_of_weights(weights, output_dir)
    if accelerator.is_main_process and problem is None:
        staging = output_dir / f".{final.name}.{os.getpid()}.tmp"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            if has_adapter(model):
                save_adapter(model, staging, weights)
            else:
                model.save_pretrained(staging, state_dict=weights)
            torch.save(pack(moments, optimizer_state), staging / "optimizer.pt")
            torch.save(rng_states, staging / "rng.pt")
            _write_json(staging / "scheduler.json", lr_scheduler.state_dict())
            if accelerator.scaler is not None:
                _write_json(staging / "scaler.json", accelerator.scaler.state_dict())
            state.save_to_json(str(staging / "trainer_state.json"))
            _write_manifest(staging)
            _put_in_place(staging, final)
        # A full disk is an OSError only for plain files: safetensors and torch.save raise errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
            problem = (
                f"{final} could not be written ({reason}); earlier checkpoints in {output_dir} are untouched. "
                f"{_free_space(output_dir)} Free some space or choose another training.output_dir, then run the same "
                "command again."
            )
    raise_together(accelerator, problem)
    return final


def _full_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool, kind: OptimizerState) -> dict[str, Any]:
    """AdamW's state with whole tensors, as an unsharded run has it; empty where it isn't kept."""
    state_dict = optimizer.state_dict()
    if kind == "none":
        return {**state_dict, "state": {}}
    states: dict[int, dict[str, Any]] = {}
    for key, values in state_dict["state"].items():
        sharded = any(isinstance(value, DTensor) for value in values.values())
        whole = {name: to_full(value) for name, value in values.items()}  # every process takes part
        if keep:
            # Gathered copies of all weights together would not fit beside the model on the device.
            states[key] = {name: value.cpu() for name, value in whole.items()} if sharded else whole
    return {**state_dict, "state": states}


def _problem_of_weights(weights: dict[str, torch.Tensor], output_dir: Path) -> str | None:
    """A sentence if a weight is NaN or infinite: such a checkpoint would sooner or later push out the good ones."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return (
                f"{name} holds NaN or infinite values, so no checkpoint is written; earlier ones in {output_dir} are "
                "intact. Lower optim.learning_rate and run the same command again."
            )
    return None


def _put_in_place(staging: Path, final: Path) -> None:
    """Give a finished checkpoint its name. What bore it before is deleted last, so one of the two is always there."""
    before = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        shutil.rmtree(before, ignore_errors=True)
        final.rename(before)
    staging.rename(final)
    _sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


_SETTINGS = ("weight_decay", "betas", "eps")
"""Of parameter groups: what a user may have changed since the checkpoint. The learning rate is the schedule's."""


def load_checkpoint(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    model: Any,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> TrainerState:
    """Put a run back to where `checkpoint` was saved; every process calls it.

    Returns:
        The state the run goes on with. Random states are set; draw nothing before the next step.

    Raises:
        UserError: if the checkpoint's adapter isn't this run's.
    """
    path = checkpoint.path
    current, adapted = model.state_dict(), has_adapter(model)
    weights = read_adapter(model, path) if adapted else load_file(path / "model.safetensors")
    # Blocks that accelerate had compiled were once saved under names with this in them.
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    whole = {n: shard_like(t, current[n]) if n in current else t for n, t in weights.items()}
    model.load_state_dict(whole, strict=not adapted)
    saved = unpack(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    _restore_optimizer(optimizer, saved, path, accelerator.print)
    _restore_schedule(optimizer, lr_scheduler, json.loads((path / "scheduler.json").read_text()))
    scaler_path = path / "scaler.json"
    if accelerator.scaler is not None and scaler_path.exists():
        accelerator.scaler.load_state_dict(json.loads(scaler_path.read_text()))
    rng_states = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
    if accelerator.process_index < len(rng_states):
        set_rng_state(rng_states[accelerator.process_index])
    if len(rng_states) != accelerator.num_processes:
        accelerator.print(
            f"{path} was saved by {len(rng_states)} process(es) and now there are {accelerator.num_processes}: every "
            "step holds the same clips, but dropout falls differently, so losses will agree closely, not bit for bit."
        )
    return TrainerState.load_from_json(str(path / "trainer_state.json"))


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: Path, say: Any) -> None:
    """Give the optimizer its memory back, or say why it begins anew."""
    before, now = optimizer_of(saved["param_groups"]), optimizer_of(optimizer.param_groups)
    if before != now:
        say(f"{path} holds the averages of {before}, which {now} can't read; it starts its averages anew.")
        optimizer.state.clear()
        return
    if not saved["state"]:
        say(f"{path} holds no optimizer state; AdamW starts its averages anew.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        saved["state"][index] = {name: shard_like(value, parameters[index]) for name, value in values.items()}
    settings = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    # With its kernel: a run that began with another of torch's for the step stays exact.
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group |= values


def _restore_schedule(
    optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR, saved: dict[str, Any]
) -> None:
    """Put the schedule to the step it had reached; rate and shape are those of the settings, which may have changed."""
    rates = lr_scheduler.base_lrs
    lr_scheduler.load_state_dict(saved)
    lr_scheduler.base_lrs = rates
    now = [rate * factor(lr_scheduler.last_epoch) for rate, factor in zip(rates, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate, base in zip(optimizer.param_groups, now, rates, strict=True):
        group["lr"], group["initial_lr"] = rate, base
    lr_scheduler._last_lr = now


def remember_callbacks(state: TrainerState, callbacks: list[TrainerCallback], interval: dict[str, Any]) -> None:
    """Put the memory of callbacks (early stopping's patience, say) and the unfinished log interval into the state."""
    kept = {key: state.stateful_callbacks[key] for key in (MICRO_BATCH,) if key in state.stateful_callbacks}
    state.stateful_callbacks = {
        type(callback).__name__: callback.state() for callback in callbacks if isinstance(callback, ExportableState)
    }
    state.stateful_callbacks |= {METER: interval, **kept}


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


def recover_saves(output_dir: Path) -> None:
    """Delete what a killed save left behind, or finish it if only its name is missing; the main process calls it."""
    for leftover in output_dir.glob(".checkpoint-*.tmp"):
        final = output_dir / leftover.name[1:].split(".")[0]
        if not final.exists() and (leftover / MANIFEST).is_file() and find_damage(leftover) is None:
            leftover.rename(final)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def put_aside_newer(output_dir: Path, going_on_from: Checkpoint | None, say: Any = print) -> None:
    """Rename checkpoints newer than the one the run goes on from; the main process calls it before the first step.

    They are damaged, or a future the user turned away from. Neither rotation nor the next start may take them for the
    newest, and nothing complete is deleted.
    """
    step = -1 if going_on_from is None else going_on_from.step
    for checkpoint in complete_checkpoints(output_dir):
        if checkpoint.step > step:
            number = 1
            while (aside := output_dir / f"aside-{number}-{checkpoint.path.name}").exists():
                number += 1
            checkpoint.path.rename(aside)
            say(f"{checkpoint.path} is newer than step {max(0, step)}, where the run goes on; it is now {aside}.")


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


def check_space(
    output_dir: Path,
    num_weights: int,
    kind: OptimizerState,
    keep_last: int,
    held_weights: int = 0,
    held_checkpoints: int = 0,
    num_trained: int | None = None,
    optimizer: str = "adamw",
) -> str:
    """What checkpoints will take on the disk, as a line to print.

    At most `keep_last` checkpoints, the best one and one being written lie there at once; besides them the exported
    model, twice while it is replaced, and what is being pushed. What lies there already is not counted again.

    Args:
        output_dir: the run's folder, which exists.
        num_weights: of the model.
        kind: what is kept of the optimizer.
        keep_last: newest checkpoints kept.
        held_weights: files of weights that pushes may hold on to at once.
        held_checkpoints: likewise, checkpoints.
        num_trained: weights that a checkpoint keeps, where that isn't all of them.
        optimizer: `optim.optimizer`.

    Raises:
        UserError: if the disk hasn't got that much left, with all figures.
    """
    trained = num_weights if num_trained is None else num_trained
    size, weights = checkpoint_bytes(trained, kind, optimizer), checkpoint_bytes(num_weights, "none")
    total = (keep_last + 2 + held_checkpoints) * size + (2 + held_weights) * weights
    what = "checkpoints, export and pushes" if held_weights or held_checkpoints else "checkpoints and export"
    present = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    needed, free = max(size, total - present), shutil.disk_usage(output_dir).free
    costs = ", ".join(f"{other} {_gigabytes(checkpoint_bytes(trained, other, optimizer))}" for other in STATE_BYTES)
    if needed > free:
        raise UserError(
            f"training.output_dir {output_dir} needs {_gigabytes(needed)} more for {what}, its disk has "
            f"{_gigabytes(free)} left. Free some space, name another folder, lower training.save_total_limit "
            f"({keep_last}), or keep less per checkpoint with training.optimizer_state ({costs})."
        )
    return (
        f"Checkpoints: {_gigabytes(size)} each with training.optimizer_state {kind} ({costs}); {what} take up to "
        f"{_gigabytes(total)} in {output_dir}, where {_gigabytes(free)} are free."
    )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _free_space(folder: Path) -> str:
    return f"{_gigabytes(shutil.disk_usage(folder).free)} are free there."


def rng_state() -> dict[str, torch.Tensor]:
    """Where this process's random numbers stand."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put this process's random numbers back."""
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
