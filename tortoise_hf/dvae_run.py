"""The folder of a DVAE's training: whether it may be used, where to go on, and the result in it.

```
dvae/config.json, dvae/model.safetensors   the DVAE, as a base holds it
mel_norms.safetensors                      the divisors of the mel spectrogram it was trained with
metrics.json                               figures of the result, its settings; written last
samples/                                   held-out clips out of their mel spectrogram and out of their codes
log.jsonl, run.json, dataset_report.json, checkpoint-STEP/    of the run itself
```
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import TrainerState

from tortoise_hf.audio import load_mel_norms
from tortoise_hf.checkpoint import Checkpoint, newest_sound_checkpoint, put_aside_newer, recover_saves
from tortoise_hf.data.check import DatasetReport
from tortoise_hf.data.mels import ClipMels, measure_mel_norms
from tortoise_hf.distributed import raise_together
from tortoise_hf.dvae_config import DVAERunConfig
from tortoise_hf.dvae_evaluation import evaluate_dvae, round_to_half, save_dvae, save_samples
from tortoise_hf.errors import UserError
from tortoise_hf.faults import lock_folder
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.run import REPORT_NAME, RUN_FILE

NORMS_NAME = "mel_norms.safetensors"
METRICS_NAME = "metrics.json"
FREE_SETTINGS = ("data.cache_dir", "data.num_proc", "training.logging_steps", "training.eval_steps",
                 "training.save_steps", "training.save_total_limit", "training.num_samples", "training.output_dir",
                 "training.half")  # fmt: skip
"""Settings that may change when a run goes on."""


def is_finished(cfg: DVAERunConfig) -> bool:
    """Whether the run's result is there."""
    return (cfg.output_dir / METRICS_NAME).is_file()


def choose_mel_norms(cfg: DVAERunConfig, train: ClipMels) -> torch.Tensor:
    """(80,) divisors: from the file that `model.mel_norms` names, else measured on all training clips.

    Raises: UserError: if that file can't be read.
    """
    if cfg.model.mel_norms is not None:
        return load_mel_norms(Path(cfg.model.mel_norms).expanduser())
    return measure_mel_norms(torch.from_numpy(train[index].T.astype(np.float32)) for index in range(len(train)))


def open_dvae_run(
    cfg: DVAERunConfig, accelerator: Accelerator, train: ClipMels, mel_norms: torch.Tensor, report: DatasetReport
) -> Checkpoint | None:
    """Take the folder for this run alone and note down what it is; every process calls it.

    Returns: the newest checkpoint to go on from; None to begin.
    Raises: UserError: if a run with other settings or clips is in the folder.
    """
    folder, problem = cfg.output_dir, None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(folder, accelerator.print)
            recover_saves(folder)
            record = {"config": cfg.to_dict(), "clips": _fingerprint(train)}
            if (folder / RUN_FILE).is_file():
                _refuse_changes(cfg, record, json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
            (folder / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (folder / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
            save_file({"mel_norms": mel_norms}, folder / NORMS_NAME)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"training.output_dir {folder} can't be written ({error.strerror or error}); name another folder."
    raise_together(accelerator, problem)
    checkpoint = newest_sound_checkpoint(folder, warn=accelerator.print)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_aside_newer(folder, checkpoint, accelerator.print)
    return checkpoint


def finish_dvae_run(
    cfg: DVAERunConfig, state: TrainerState, mel_norms: torch.Tensor, held_out: ClipMels, train: ClipMels
) -> dict[str, Any]:
    """Make the best checkpoint the run's result; called by the main process.

    Without held-out clips the last checkpoint is taken and figures are those of the training clips.

    Returns: what metrics.json holds.
    """
    folder, step = cfg.output_dir, state.best_global_step or state.global_step
    dvae = DVAE.from_pretrained(folder / f"checkpoint-{step}", dtype="float32").eval()
    if cfg.training.half:
        round_to_half(dvae)
    clips = held_out if len(held_out) else train
    figures = evaluate_dvae(dvae, mel_norms, clips)
    save_dvae(dvae, folder / "dvae", cfg.training.half)
    save_samples(dvae, mel_norms, clips, folder / "samples", cfg.training.num_samples)
    metrics = {
        "step": step,
        "clips": "held out" if len(held_out) else "training",
        "num_train_clips": len(train),
        "num_eval_clips": len(held_out),
        **{name: round(value, 5) for name, value in figures.items()},
        "num_parameters": sum(parameter.numel() for parameter in dvae.parameters()),
        "bytes": (folder / "dvae" / "model.safetensors").stat().st_size,
        "settings": cfg.to_dict(),
    }
    (folder / METRICS_NAME).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _fingerprint(train: ClipMels) -> str:
    names = json.dumps(list(zip(train.clip_ids, train.num_codes.tolist(), strict=True)))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _refuse_changes(cfg: DVAERunConfig, now: dict[str, Any], then: dict[str, Any]) -> None:
    for section, values in now["config"].items():
        for name, value in values.items():
            before = then["config"][section].get(name, value)
            if before != value and f"{section}.{name}" not in FREE_SETTINGS:
                raise UserError(
                    f"{cfg.output_dir} was begun with {section}.{name} {before}, and now it is {value}; the run can't "
                    "go on like that. Set it back, or name another training.output_dir."
                )
    if now["clips"] != then["clips"]:
        raise UserError(
            f"{cfg.output_dir} was begun with other training clips than are found now; the run can't go on with "
            "those. Bring them back, or name another training.output_dir."
        )
