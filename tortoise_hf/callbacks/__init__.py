"""What happens around the loop: learning rate, checkpoints, Hub, log, samples, and transformers' own callbacks."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback

from tortoise_hf.callbacks.checkpointing import CheckpointCallback
from tortoise_hf.callbacks.hub import HubCallback, held_by_pushes
from tortoise_hf.callbacks.interrupt import InterruptCallback
from tortoise_hf.callbacks.lr_schedule import LRScheduleCallback
from tortoise_hf.callbacks.overfitting import OverfittingCallback
from tortoise_hf.callbacks.run_log import RunLogCallback
from tortoise_hf.callbacks.samples import SamplesCallback
from tortoise_hf.config import Config
from tortoise_hf.errors import UserError
from tortoise_hf.models.pretrained import BaseFiles
from tortoise_hf.samples import Samples


def build_callbacks(
    cfg: Config, accelerator: Accelerator, files: BaseFiles | None = None, samples: Samples | None = None
) -> list[TrainerCallback]:
    """The callbacks a config asks for, in order of action.

    They are: flow, schedule, stop, checkpoint, Hub, interrupt, samples, loggers.

    Args:
        cfg: the experiment.
        accelerator: of this process.
        files: what the run starts from; without it nothing is pushed.
        samples: what is spoken on the way; None for nothing.

    Raises:
        UserError: if TensorBoard is asked for and not installed.
    """
    callbacks: list[TrainerCallback] = [DefaultFlowCallback(), LRScheduleCallback()]
    if cfg.callbacks.early_stopping_patience > 0 and cfg.training.eval_strategy != "no":
        callbacks.append(
            EarlyStoppingCallback(cfg.callbacks.early_stopping_patience, cfg.callbacks.early_stopping_threshold)
        )
    callbacks.append(OverfittingCallback())
    held = held_by_pushes(cfg.hub)
    callbacks += [CheckpointCallback(accelerator, cfg.training.save_total_limit, held), RunLogCallback()]
    if files is not None and (cfg.hub.repo_id is not None or cfg.hub.checkpoint_repo_id is not None):
        hub = HubCallback(cfg, accelerator, files)
        callbacks += [hub, InterruptCallback(accelerator, hub.send_what_is_owed)]
    else:
        callbacks.append(InterruptCallback(accelerator))
    writer = _summary_writer(cfg, accelerator) if cfg.callbacks.tensorboard else None
    if samples is not None:
        callbacks.append(SamplesCallback(accelerator, samples, writer))
    if cfg.callbacks.tensorboard:
        callbacks.append(TensorBoardCallback(writer))
    if cfg.callbacks.progress:
        # A bar redraws itself; in a file or a pipe that is a wall of half lines.
        callbacks.append(ProgressCallback() if sys.stderr.isatty() else PrinterCallback())
    return callbacks


def _summary_writer(cfg: Config, accelerator: Accelerator) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "callbacks.tensorboard is true, but the package tensorboard isn't installed; run pip install "
            "'tortoise_hf[tensorboard]' or set it to false."
        ) from error
    # The callback would write into a folder named after date and host; curves belong to the run.
    return SummaryWriter(cfg.training.logging_dir) if accelerator.is_main_process else None
