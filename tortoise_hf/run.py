"""The run's folder: whether it may be used, where to go on, and what is made of it at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers import TrainerCallback, TrainerState

from tortoise_hf.adapter_files import is_adapter
from tortoise_hf.checkpoint import (
    Checkpoint,
    find_damage,
    load_checkpoint,
    newest_sound_checkpoint,
    put_aside_newer,
    recover_saves,
    restore_callbacks,
)
from tortoise_hf.config import Config, LoraConfig
from tortoise_hf.data.check import DatasetReport
from tortoise_hf.distributed import raise_together
from tortoise_hf.errors import UserError
from tortoise_hf.export import ExportReport, export_model
from tortoise_hf.faults import LOCK_NAME, lock_folder
from tortoise_hf.models.pretrained import BaseFiles, load_base_weights, load_trained
from tortoise_hf.places import absolute_settings, public_settings

if TYPE_CHECKING:
    from datasets import Dataset

    from tortoise_hf.samples import Samples

RUN_FILE = "run.json"
EXPORT_DIR = "export"
REPORT_NAME = "dataset_report.json"
"""Written by `scripts/prepare.py` too."""
CLIPS_FILE = "train_clips.json"
"""What `clip_hashes` gave when the run began, to name the clips that changed."""
NOT_A_RUN = (REPORT_NAME, CLIPS_FILE, LOCK_NAME, f".{RUN_FILE}.tmp", f".{CLIPS_FILE}.tmp")
"""Files a run leaves that was killed before it began; a folder that holds nothing else is still free."""
FIXED_SETTINGS = ("data.padding", "data.num_conditioning_clips", "data.conditioning_seconds", "model.base",
                  "model.from_scratch", "lora.rank", "lora.alpha", "lora.conditioning_encoder", "lora.embeddings",
                  "lora.heads", "training.plan", "training.batch_size", "training.seed")  # fmt: skip
"""Settings a run can't change half-way without becoming another run. Micro-batch size, processes, learning rate and
length may change."""
_DEFAULTS = {"lora": dataclasses.asdict(LoraConfig())}
"""Sections that records of earlier versions lack, as those versions behaved."""


@dataclass(frozen=True)
class Run:
    """A run's folder, ready to be written to."""

    output_dir: Path
    max_steps: int
    """Optimizer steps of the whole run."""
    data_fingerprint: str
    num_train_clips: int
    checkpoint: Checkpoint | None
    """Where to go on; None begins at step 0."""
    finished_step: int | None
    """Last step of a run that ended by itself; None if it is under way."""
    plan: dict[str, Any] = field(default_factory=dict)
    """How the settings came about, as `Plan.to_dict` gave it when the run began."""


def clip_hashes(examples: Dataset) -> dict[str, str]:
    """What a run trains on: every clip's id with a short hash of its text ids and codes, in order.

    Args:
        examples: prepared ones.
    """
    table = examples.select_columns(["clip_id", "text_ids", "mel_codes"]).with_format("arrow")[:]
    hashes = {}
    for clip_id, text_ids, mel_codes in zip(*(table.column(name) for name in table.column_names), strict=True):
        digest = hashlib.sha256(text_ids.values.to_numpy().tobytes())
        digest.update(b"|" + mel_codes.values.to_numpy().tobytes())
        hashes[clip_id.as_py()] = digest.hexdigest()[:12]
    return hashes


def fingerprint(clips: dict[str, str]) -> str:
    """Short hash of `clip_hashes`."""
    return hashlib.sha256(json.dumps(list(clips.items())).encode()).hexdigest()[:16]


def check_run_folder(cfg: Config) -> None:
    """Refuse a folder that can't be used, before anything is fetched or prepared.

    Raises:
        UserError: if the folder holds something else, or a run while `training.resume` is never.
    """
    output_dir = Path(cfg.training.output_dir)
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(
            f"training.output_dir {output_dir} can't be written ({there} is no folder or read-only); name "
            "another folder."
        )
    if not output_dir.exists() or all(path.name in NOT_A_RUN for path in output_dir.iterdir()):
        return
    if not (output_dir / RUN_FILE).is_file():
        raise UserError(
            f"training.output_dir {output_dir} holds files but no {RUN_FILE}, so it is not the folder of a run. Name "
            "another folder."
        )
    if cfg.training.resume == "never":
        raise UserError(
            f"{output_dir} holds a run and training.resume is never. Name another training.output_dir, or take "
            "training.resume auto to go on with it."
        )


def read_record(cfg: Config) -> dict[str, Any] | None:
    """What is known of the run that goes on: of the one in output_dir, else of the checkpoint's that `resume` names.

    Raises:
        UserError: if the record can't be read.
    """
    folders = [Path(cfg.training.output_dir)]
    if cfg.training.resume not in ("auto", "never"):
        folders.append(Path(cfg.training.resume).resolve().parent)
    for path in (folder / RUN_FILE for folder in folders):
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} can't be read ({error}); bring it back, or name another folder.") from error
    return None


def open_run(
    cfg: Config,
    accelerator: Accelerator,
    clips: dict[str, str],
    steps_per_epoch: int,
    plan: dict[str, Any] | None = None,
) -> Run:
    """Take the folder for this run alone, decide where to begin, note down what the run is; every process calls it.

    Args:
        cfg: settings without gaps.
        accelerator: of this process.
        clips: what is trained on, see `clip_hashes`.
        steps_per_epoch: optimizer steps that see every clip once.
        plan: how the settings came about; noted down with them.

    Raises:
        UserError: if settings or data changed so that going on would not continue the run in this folder, the
            checkpoint named by `training.resume` isn't sound, or another run is in the folder.
    """
    output_dir, resume = Path(cfg.training.output_dir), cfg.training.resume
    max_steps = cfg.training.max_steps or cfg.training.num_train_epochs * steps_per_epoch

    def take_folder() -> None:
        with _writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            lock_folder(output_dir, accelerator.print)
            recover_saves(output_dir)

    def write_down() -> None:
        with _writing(output_dir):
            put_aside_newer(output_dir, checkpoint, accelerator.print)
            _write_json(output_dir / CLIPS_FILE, clips)
        write_record(run, cfg)

    _on_main_process(accelerator, take_folder)
    checkpoint, finished_step = None, None
    if (output_dir / RUN_FILE).is_file():
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
        _refuse_changes(cfg, record, clips, output_dir)
        finished_step = record["finished_step"] if record["max_steps"] == max_steps else None
        checkpoint = newest_sound_checkpoint(output_dir, warn=accelerator.print)
        if checkpoint is None or checkpoint.step != finished_step:
            finished_step = None
    if resume not in ("auto", "never"):
        checkpoint, finished_step = _named_checkpoint(Path(resume)), None
        source = Path(resume).resolve().parent
        if (source / RUN_FILE).is_file():
            _refuse_changes(cfg, json.loads((source / RUN_FILE).read_text(encoding="utf-8")), clips, source)
    run = Run(output_dir, max_steps, fingerprint(clips), len(clips), checkpoint, finished_step, plan or {})
    accelerator.wait_for_everyone()  # nobody reads the record any more
    _on_main_process(accelerator, write_down)
    return run


def _on_main_process(accelerator: Accelerator, do: Callable[[], None]) -> None:
    """Call a function on the main process while the others wait; a `UserError` there ends them all."""
    problem = None
    if accelerator.is_main_process:
        try:
            do()
        except UserError as error:
            problem = str(error)
    raise_together(accelerator, problem)


def _named_checkpoint(path: Path) -> Checkpoint:
    problem = find_damage(path) if path.is_dir() else "there is no such folder"
    if problem is not None:
        raise UserError(f"training.resume {path} is not a sound checkpoint: {problem}. Name a folder checkpoint-STEP.")
    return Checkpoint(path, json.loads((path / "trainer_state.json").read_text())["global_step"])


def fixed_setting(config: Mapping[str, Any], key: str) -> Any:
    """One of `FIXED_SETTINGS` out of a record's settings; None if its version didn't know it yet."""
    section, name = key.split(".")
    return config.get(section, _DEFAULTS.get(section, {})).get(name)


def _refuse_changes(cfg: Config, record: dict[str, Any], clips: dict[str, str], folder: Path) -> None:
    now, then = cfg.to_dict(), record["config"]
    for key in FIXED_SETTINGS:
        section, name = key.split(".")
        before = fixed_setting(then, key)
        before = now[section][name] if before is None else before
        if now[section][name] != before:
            raise UserError(
                f"{folder} was begun with {key} {before}, and now it is {now[section][name]}; the run "
                "can't go on like that. Set it back, or name another training.output_dir."
            )
    if fingerprint(clips) != record["data_fingerprint"]:
        raise UserError(
            f"{folder} was begun with {record['num_train_clips']:,} training clips that are not the {len(clips):,} "
            f"found now{_difference(folder, clips)}; the run can't go on with other clips. Bring them back, or name "
            "another training.output_dir."
        )


def _difference(folder: Path, clips: dict[str, str]) -> str:
    """` (gone: a, b; new: c; changed: d)`, as far as it is known."""
    try:
        before = json.loads((folder / CLIPS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    kinds = {
        "gone": [clip for clip in before if clip not in clips],
        "new": [clip for clip in clips if clip not in before],
        "changed": [clip for clip in clips if before.get(clip, clips[clip]) != clips[clip]],
    }
    parts = []
    for kind, ids in kinds.items():
        if ids:
            parts.append(f"{kind}: {', '.join(ids[:5])}{f' and {len(ids) - 5} more' * (len(ids) > 5)}")
    return f" ({'; '.join(parts)})" if parts else " (in another order)"


def write_record(run: Run, cfg: Config) -> None:
    """Store what the next `open_run` will compare with; the main process calls it at the start and at the end.

    Raises:
        UserError: if the folder can't be written.
    """
    record = {
        "config": cfg.to_dict(),
        "data_fingerprint": run.data_fingerprint,
        "num_train_clips": run.num_train_clips,
        "max_steps": run.max_steps,
        "finished_step": run.finished_step,
        "plan": run.plan,
        "hardware": _hardware(),
        "cwd": os.getcwd(),
    }
    with _writing(run.output_dir):
        run.output_dir.mkdir(parents=True, exist_ok=True)
        _write_json(run.output_dir / RUN_FILE, record)


def write_report(cfg: Config, report: DatasetReport) -> None:
    """Store what the check of the dataset found; the main process calls it.

    Raises:
        UserError: if the folder can't be written.
    """
    path = Path(cfg.training.output_dir) / REPORT_NAME
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report.to_json(), encoding="utf-8")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"training.output_dir {folder} can't be written ({error.strerror or error}); name another folder."
        ) from error


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def start_or_resume(
    cfg: Config,
    run: Run,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    callbacks: list[TrainerCallback],
) -> TrainerState:
    """Counters of a run that begins, or everything as its checkpoint left it; every process calls it."""
    if run.checkpoint is None:
        # Encoding clips and making weights draw random numbers, and a run started again finds some of that done.
        set_seed(cfg.training.seed, device_specific=True)
        return mark_process(TrainerState(), cfg, accelerator, run.max_steps)
    state = load_checkpoint(run.checkpoint, accelerator, accelerator.unwrap_model(model), optimizer, lr_scheduler)
    restore_callbacks(state, callbacks)
    return mark_process(state, cfg, accelerator, run.max_steps)


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


def finish_run(
    cfg: Config, run: Run, files: BaseFiles, state: TrainerState, samples: Samples | None = None
) -> ExportReport | None:
    """Export the best checkpoint (the last one without evaluations), let it speak, and note that the run is over.

    Called by the main process. None if the run was over before and its export is still there.
    """
    export_dir = run.output_dir / EXPORT_DIR
    if run.finished_step is not None and export_dir.is_dir():
        return None
    name = state.best_model_checkpoint or f"checkpoint-{state.global_step}"
    step = state.best_global_step if state.best_model_checkpoint else state.global_step
    checkpoint = run.output_dir / name
    model = load_trained(checkpoint, files)
    record = json.loads((run.output_dir / RUN_FILE).read_text(encoding="utf-8"))
    summary = export_summary(record, state.log_history, files.lineage)
    base_state = None if cfg.model.from_scratch else load_base_weights(files)[1]
    report = export_model(
        model,
        export_dir,
        files=files,
        step=step,
        summary=summary,
        base_state=base_state,
        adapter=checkpoint if is_adapter(checkpoint) else None,
        overwrite=True,
    )
    if samples is not None:
        samples.finish(model, step)
    write_record(dataclasses.replace(run, finished_step=state.global_step), cfg)
    return report


def export_summary(
    record: Mapping[str, Any], log_history: Iterable[Mapping[str, Any]], lineage: Sequence[str]
) -> dict[str, Any]:
    """What an export tells of its run, without places on this machine.

    Args:
        record: content of the run's run.json.
        log_history: of the checkpoint that is exported.
        lineage: see `BaseFiles.lineage`.
    """
    return {
        "settings": public_settings(absolute_settings(record)),
        "num_train_clips": record["num_train_clips"],
        "evaluations": [dict(entry) for entry in log_history if "eval_loss" in entry],
        "lineage": list(lineage),
        "hardware": record.get("hardware"),
    }


def _hardware() -> str:
    """What the run computes on, for the voice's card."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    count = PartialState().num_processes
    return name if count == 1 else f"{count} x {name}"
