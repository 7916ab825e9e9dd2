"""Failures a user can mend, put into words: full disks, memory, lost processes and workers, a folder in use."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import torch

from tortoise_hf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

GO_ON = "The last checkpoint is intact; the same command goes on from there."
LOCK_NAME = ".lock"
LOCK_SECONDS = 60.0
"""How long a run waits for another process in its folder: one that was interrupted may still be saving."""

_locks: dict[Path, IO[str]] = {}
"""Open for as long as the process lives; closing one would give its lock up."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)
_LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "ProcessGroup", "Broken pipe")


class StepOutOfMemory(Exception):
    """A step didn't fit; no weight has moved, and every process raises it."""


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Turn failures of the machine into a `UserError`; what isn't known stays a traceback.

    Raises:
        UserError: what happened and what to do.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, EOFError) as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if _names_a_worker(error):
            _forget_workers()
        raise UserError(sentence) from error


def explain(error: BaseException) -> str | None:
    """A known failure as a sentence that says what to do; None for others."""
    text = str(error).strip().split("\n")[0]
    if is_out_of_memory(error):
        return (
            f"Out of memory outside the training step ({text}). Lower training.eval_batch_size and "
            f"training.micro_batch_size, or set model.gradient_checkpointing true. {GO_ON}"
        )
    if _names_a_worker(error):
        return (
            f"A process that collates batches died ({text}); the usual cause is too little memory. Lower "
            f"data.num_workers; 0 needs no such process. {GO_ON}"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = error.filename or "A file"
        return (
            f"{where} can't be used: {error.strerror or error}. Free some space there or mend its permissions. {GO_ON}"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (
            f"torch.compile failed ({text}); on a CPU it takes a C++ compiler, on a GPU Triton besides. Leave out "
            f"accelerate's --dynamo_backend to do without. {GO_ON}"
        )
    if torch.distributed.is_initialized() and any(mark in text for mark in _LOST_PROCESS):
        return f"Another process of this run ended or can't be reached ({text}); its own message says why. {GO_ON}"
    return None


def _names_a_worker(error: BaseException) -> bool:
    # One that dies while it hands a batch over is noticed by its closed connection.
    text = str(error)
    return "DataLoader worker" in text or "ancdata" in text or isinstance(error, (ConnectionResetError, EOFError))


def _forget_workers() -> None:
    """Keep torch, which tidies up after its workers at exit, from printing tracebacks about the one that is gone."""
    say = sys.unraisablehook

    def hook(failure: sys.UnraisableHookArgs) -> None:
        if "DataLoaderIter" not in getattr(failure.object, "__qualname__", ""):
            say(failure)

    sys.unraisablehook = hook


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has no memory left."""
    marks = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in marks)


def lock_folder(folder: Path, say: Callable[[str], None] = print) -> None:
    """Keep other runs out of a folder for as long as this process lives; without effect where there are no such locks.

    A process that was interrupted may still be saving there, so this waits a minute. Locks end with their process,
    however it ends, and its children don't inherit them.

    Raises:
        UserError: if another run has the folder.
    """
    if fcntl is None or folder.resolve() in _locks:
        return
    file = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    until = time.monotonic() + LOCK_SECONDS
    said = False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                file.close()
                return
        file.seek(0)
        owner = file.read().strip() or "unknown"
        if time.monotonic() > until:
            raise UserError(
                f"{folder} is in use by process {owner}, which trains into it. Stop that one, or name another "
                "training.output_dir."
            )
        if not said:
            say(f"Waiting for process {owner}, which still uses {folder}.")
            said = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _locks[folder.resolve()] = file
