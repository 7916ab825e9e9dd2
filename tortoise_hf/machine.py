"""Devices, precision and processes: what `accelerate launch` decided, and a word to the user about it."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from transformers.utils.logging import disable_progress_bar

PREPARE_TIMEOUT = timedelta(hours=12)
"""How long processes wait for the main one: it may be preparing a large dataset meanwhile."""


def start_accelerator(seed: int) -> Accelerator:
    """The Accelerator of this process, with seeded random numbers that differ between processes.

    Precision, devices and processes come from `accelerate launch`; without it, from what the machine has: one process,
    no mixed precision.
    """
    disable_progress_bar()  # of weights loading and saving: two lines per checkpoint
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PREPARE_TIMEOUT)])
    set_seed(seed, device_specific=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    # One line per request and per file is too much where a progress bar says the same.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return accelerator


def describe(accelerator: Accelerator) -> str:
    """One line on where and how the run computes, with a warning where that isn't what was asked for."""
    device = accelerator.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    else:
        name = f"{device.type} ({torch.get_num_threads()} threads)"
    count = accelerator.num_processes
    processes = "1 process" if count == 1 else f"{count} processes"
    line = f"Machine: {processes} on {name}, mixed precision {accelerator.mixed_precision}."
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":
        line += "\nWarning: fp16 needs a GPU; on a CPU this run computes in float32, without a gradient scaler."
    return line
