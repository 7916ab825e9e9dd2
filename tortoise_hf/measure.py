"""What training steps cost on this machine: a few forward and backward passes before the run, timed and weighed.

Weights, gradients and random numbers are left as they were found, so a measured run has the numbers of one that wasn't.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset

from tortoise_hf.config import Config
from tortoise_hf.data.collate import Batch, Collator
from tortoise_hf.data.sampler import Draw
from tortoise_hf.loss import gpt_loss, weighted_mean
from tortoise_hf.machine import set_gradient_checkpointing
from tortoise_hf.optimizer_state import MOMENT_BYTES
from tortoise_hf.plan import Measurement, Trial, choose_micro_batch, micro_batch_candidates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

    from tortoise_hf.models.gpt import TortoiseGPT

TRIAL_SECONDS = 10.0
"""A trial expected to take longer isn't made; its memory is extrapolated from a smaller one."""
USABLE_SHARE = {"cuda": 0.9, "cpu": 0.8}
"""Share of the free memory a run may plan with; the rest is for fragmentation and for what else runs."""
TIMED_BATCHES = 3


def measure(
    cfg: Config,
    accelerator: Accelerator,
    model: TortoiseGPT,
    dataset: Dataset,
    lengths: Sequence[int],
    collate: Collator,
    share: int,
) -> Measurement:
    """Try rising micro-batches of the longest clips, then time typical ones at the size the plan would take.

    Args:
        cfg: settings as given; a micro-batch size in it is the only one tried.
        accelerator: device and precision.
        model: the GPT, not yet wrapped; it is moved to the device.
        dataset: takes a `Draw`, gives an example.
        lengths: (N,) positions of each clip's row.
        collate: examples to a batch.
        share: clips of an optimizer step one process gets.
    """
    probe = _Probe(cfg, accelerator, model.to(accelerator.device), dataset, np.asarray(lengths), collate)
    with probe.leaving_no_trace():
        found = probe.start()
        sizes = [cfg.training.micro_batch_size or 0]
        if not sizes[0]:
            sizes = micro_batch_candidates(share, found.device)
        asked = cfg.model.gradient_checkpointing
        for checkpointing in (False, True) if asked is None else (asked,):
            found = probe.try_sizes(found, sizes, checkpointing)
            size, chosen, _ = choose_micro_batch(cfg, share, found)
            if found.fits(size, chosen) and chosen == checkpointing and size >= min(4, sizes[-1]):
                break
        size, chosen, _ = choose_micro_batch(cfg, share, found)
        if found.fits(size, chosen):
            found = dataclasses.replace(found, seconds_per_clip=probe.time_typical(size, chosen))
    return found


class _Probe:
    """Runs passes over chosen clips and watches memory."""

    def __init__(
        self,
        cfg: Config,
        accelerator: Accelerator,
        model: TortoiseGPT,
        dataset: Dataset,
        lengths: np.ndarray,
        collate: Collator,
    ) -> None:
        self.cfg, self.accelerator, self.model = cfg, accelerator, model
        self.dataset, self.collate = dataset, collate
        self.device = accelerator.device
        self.by_length = np.argsort(-lengths, kind="stable")
        self.last_seconds = 0.0

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Put back mode, gradients, random numbers and memory."""
        was_training = self.model.training
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                self.model.train()
                yield
        finally:
            set_gradient_checkpointing(self.model, False)
            self.model.zero_grad(set_to_none=True)
            self.model.train(was_training)
            if cuda:
                torch.cuda.empty_cache()

    def start(self) -> Measurement:
        """Make gradients, as there are in every step but the first, and weigh what is there before a batch comes."""
        self._pass(self._batch(self.by_length[-1:]))
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        if kind == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
            fixed = torch.cuda.memory_allocated(self.device)
        else:
            fixed = psutil.Process().memory_info().rss
            free = psutil.virtual_memory().available // self.accelerator.num_processes + fixed
        return Measurement(
            device=kind,
            usable_bytes=int(USABLE_SHARE[kind] * free),
            fixed_bytes=fixed,
            optimizer_bytes=round(MOMENT_BYTES[self.cfg.optim.optimizer] * parameters),
        )

    def try_sizes(self, found: Measurement, sizes: list[int], checkpointing: bool) -> Measurement:
        """Go up through `sizes` until one doesn't fit, or would take too long."""
        set_gradient_checkpointing(self.model, checkpointing)
        self.last_seconds, last_size = 0.0, 1
        for size in sizes:
            tried = any(trial.gradient_checkpointing == checkpointing for trial in found.trials)
            if tried and not found.fits(size, checkpointing):
                break
            if self.last_seconds * size / last_size > TRIAL_SECONDS:
                break
            trial = Trial(size, checkpointing, self._weigh(size))
            last_size = size
            found = dataclasses.replace(found, trials=(*found.trials, trial))
            if trial.peak_bytes is None:
                break
        return found

    def time_typical(self, size: int, checkpointing: bool) -> float:
        """Seconds per clip in micro-batches of `size` clips of like length, over the whole range of lengths."""
        set_gradient_checkpointing(self.model, checkpointing)
        groups = np.array_split(self.by_length, TIMED_BATCHES)
        batches = [self._batch(group[len(group) // 2 :][:size]) for group in groups if len(group)]
        seconds, clips = 0.0, 0
        for batch in batches:
            if seconds > TRIAL_SECONDS:
                break
            if self.device.type == "cuda":
                self._pass(batch)  # a GPU is slower with a shape it sees for the first time
            self._pass(batch)
            seconds += self.last_seconds
            clips += len(batch.indices)
        return seconds / clips

    def _batch(self, indices: np.ndarray) -> Batch:
        draws = [Draw(int(index), 0, 1) for index in indices]
        return self.collate([self.dataset[draw] for draw in draws])

    def _weigh(self, size: int) -> int | None:
        """Peak memory of a pass over the `size` longest clips; None if there wasn't enough."""
        longest = np.resize(self.by_length[:size], size)
        batch = self._batch(longest)
        self._reset_peak()
        try:
            self._pass(batch)
        except torch.OutOfMemoryError:
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return None
        return self._peak()

    def _pass(self, batch: Batch) -> None:
        """Forward and backward; gradients are set to zero, not freed, as they stay between micro-batches."""
        self._wait()
        started = time.perf_counter()
        batch = batch.to(self.device)
        with self.accelerator.autocast():
            sums = gpt_loss(self.model, batch)
        optim = self.cfg.optim
        weighted_mean(sums, sums.counts(), optim.text_loss_weight, optim.mel_loss_weight).backward()
        self._wait()
        self.last_seconds = time.perf_counter() - started
        self.model.zero_grad(set_to_none=False)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            # Linux: forget the highest memory use of this process so far.
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass  # the peak since the process began is then what is reported: too much rather than too little

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _highest_memory_use()


def _highest_memory_use() -> int:
    """Most bytes this process had in memory at once."""
    try:
        with open("/proc/self/status") as file:
            fields: dict[str, Any] = dict(line.split(":", 1) for line in file if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return psutil.Process().memory_info().rss
