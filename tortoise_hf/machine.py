"""Devices, precision and processes: what `accelerate launch` decided, and a word to the user about it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    set_seed,
    str_to_bool,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tortoise_hf.errors import UserError

MIXED_PRECISIONS = ("no", "fp16", "bf16")
STEP_TIMEOUT = timedelta(minutes=15)
"""How long a process waits for the others in a step, a save or an evaluation before it ends with an error: long enough
for a checkpoint on a slow disk. A process that dies is noticed much sooner, through its launcher or its connection."""
PREPARE_TIMEOUT = timedelta(hours=12)
"""How long processes wait for the main one to prepare the dataset."""
_PR_SET_PDEATHSIG = 1
"""Source: Linux's prctl.h."""


def start_accelerator(seed: int) -> Accelerator:
    """The Accelerator of this process, with seeded random numbers that differ between processes.

    Precision, devices and processes come from `accelerate launch`; without it, from what the machine has: one process,
    no mixed precision.

    Raises:
        UserError: for ways of training this package doesn't support.
    """
    disable_progress_bar()  # of weights loading and saving: two lines per checkpoint
    _end_with_launcher()
    _refuse_engines()
    # Apple's GPUs know no float64, which losses and counts are summed in.
    cpu = torch.backends.mps.is_available()
    try:
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=STEP_TIMEOUT)])
    except ValueError as error:
        raise UserError(
            f"accelerate can't use what it was told ({error}); correct the flags of accelerate launch, its config "
            "file, or the variable that begins with ACCELERATE_."
        ) from error
    if accelerator.mixed_precision not in MIXED_PRECISIONS:  # accelerate goes on in full precision without a word
        raise UserError(
            f"accelerate was told mixed precision {accelerator.mixed_precision}, expected one of "
            f"{', '.join(MIXED_PRECISIONS)}; correct --mixed_precision of accelerate launch, its config file, or the "
            "variable ACCELERATE_MIXED_PRECISION."
        )
    _check_sharding(accelerator)
    set_seed(seed, device_specific=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    # One line per request and per file is too much where a progress bar says the same.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return accelerator


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the main process through, and the others when it is done, however many hours that takes."""
    if accelerator.num_processes == 1:
        yield
        return
    # A group of its own: the patience needed here would let a run with a dead process hang for as long.
    waiting = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    if not accelerator.is_main_process:
        dist.barrier(waiting)
    yield
    if accelerator.is_main_process:
        dist.barrier(waiting)


def _end_with_launcher() -> None:
    """Have the system send SIGTERM when the launcher dies, so that no process stays behind and writes into the folder.

    `accelerate launch` passes on neither a SIGTERM of its own nor, always, Ctrl-C. Without a launcher the parent may be
    a shell that is closed on purpose.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _refuse_engines() -> None:
    """Say so before anything is set up: without their packages accelerate would end in a traceback."""
    for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if str_to_bool(os.environ.get(variable, "false")):
            raise UserError(
                f"accelerate was told to use {name}, which moves the weights by itself: what this package promises of "
                "a step (clipping by parameter group, NaN steps left out, another try when memory runs out, exact "
                "checkpoints) would be lost without a word. Take configs/accelerate/fsdp2.yaml, which shares the "
                "weights, gradients and optimizer state out as well."
            )


def _check_sharding(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    asked = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if asked and accelerator.num_processes > 1 and kind == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs only and would go on unsharded without a word; torch can do it on CPUs as well.
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does it for GPUs
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("accelerate was told to use FSDP 1; set fsdp_version: 2 (see configs/accelerate/fsdp2.yaml).")


def set_gradient_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    # transformers renames the pair; the old names are gone in v6 and the new ones are not in 5.17.
    name = "enable" if on else "disable"
    change = getattr(model, f"activation_checkpointing_{name}", None) or getattr(
        model, f"gradient_checkpointing_{name}"
    )
    change()


def compile_blocks(accelerator: Accelerator, blocks: Sequence[nn.Module]) -> None:
    """Compile blocks where they stand, if `accelerate launch --dynamo_backend` asks for it; call before `prepare`.

    accelerate itself would put wrappers around modules: weights would go by other names in checkpoints.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    options = plugin.to_kwargs()
    options.pop("use_regional_compilation", None)  # these are the regions
    for block in blocks:
        block.compile(**options | {"dynamic": True})  # every micro-batch has another length
    what = "blocks of the GPT" if blocks else "nothing, for only the GPT has blocks"
    accelerator.print(f"Compiled in the first steps: {what} ({plugin.backend.value.lower()}).")
    plugin.backend = DynamoBackend.NO


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
    if accelerator.distributed_type == DistributedType.FSDP:
        processes += " that share the weights out (FSDP2)"
    line = f"Machine: {processes} on {name}, mixed precision {accelerator.mixed_precision}."
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":
        line += "\nWarning: fp16 needs a GPU; on a CPU this run computes in float32, without a gradient scaler."
    if torch.backends.mps.is_available():
        line += "\nApple's GPU is not used: it has no float64, in which losses are summed."
    return line
