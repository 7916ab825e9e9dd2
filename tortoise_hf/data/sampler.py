"""Which clips make which optimizer step, and which process works on which of them.

The plan of an epoch is a pure function of the seed, the epoch and the clips' lengths. The number of processes and the
micro-batch size only decide how a step is dealt out, never what is in it, so runs on other hardware see the same steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

POOL_CLIPS = 256
"""Clips sorted by length together. Larger pools make micro-batches of more equal lengths, smaller ones mix lengths
better in a step. At 256, padding rows with LJSpeech's lengths would add 1.6 % in steps of 128 clips and micro-batches
of 8, and 4 % in steps of 8."""

LENGTH_JITTER = 0.05
"""Share by which lengths are blurred before sorting. Without it a dataset smaller than a pool would form the same steps
in every epoch; 5 % halves the pairs of clips that meet again and adds about 1 % to what padding would."""


class Draw(NamedTuple):
    """One place of a micro-batch."""

    index: int
    """Row of the examples."""
    epoch: int
    """Epoch, from 0; decides the conditioning clips."""
    weight: int
    """1, or 0 for a clip that only fills an otherwise empty micro-batch: its targets count for nothing."""
    group: tuple[int, ...] = ()
    """Rows of the step that may hear the same conditioning clips, this one among them; empty: this one alone."""


def count_positions(num_text_ids: Sequence[int] | np.ndarray, num_mel_codes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions of compact rows: conditioning, START ids STOP STOP, START codes.

    Args:
        num_text_ids: (N,) text ids of each clip.
        num_mel_codes: (N,) mel codes of each clip.

    Returns: (N,) integers.
    """
    return 1 + (np.asarray(num_text_ids) + 3) + (np.asarray(num_mel_codes) + 1)


class StepSampler:
    """Deals clips of similar length to optimizer steps, processes and micro-batches.

    Every clip comes once per epoch. Each step holds exactly `batch_size` clips, but for the last one of an epoch, which
    holds what is left. All processes get the same number of micro-batches in a step. For evaluation take `batch_size =
    len(lengths)`: epoch 0 is then a single step over all clips.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        micro_batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        conditioning_group: int = 1,
    ) -> None:
        """Plan for one process.

        Args:
            lengths: (N,) positions of each clip's row (see `count_positions`).
            batch_size: clips per optimizer step, over all processes.
            micro_batch_size: most clips one process works on at once.
            num_processes: processes that share a step.
            process_index: this process, from 0.
            seed: of the clip order.
            conditioning_group: clips of a step, neighbours in the order of length, that may share their conditioning.
        """
        self.lengths = np.asarray(lengths, dtype=np.int64)
        assert self.lengths.ndim == 1, "lengths must be one-dimensional"
        assert len(self.lengths) > 0, "there is no clip to sample from"
        assert batch_size >= 1, "batch_size must be 1 or more"
        assert micro_batch_size >= 1, "micro_batch_size must be 1 or more"
        assert 0 <= process_index < num_processes, "process_index must lie below num_processes"
        assert conditioning_group >= 1, "conditioning_group must be 1 or more"
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.conditioning_group = conditioning_group

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def step_size(self, step: int) -> int:
        """Clips of an epoch's step number `step` (from 0), over all processes."""
        return min(self.batch_size, len(self.lengths) - step * self.batch_size)

    def num_micro_batches(self, step: int) -> int:
        """Micro-batches each process gets in an epoch's step number `step` (from 0)."""
        return -(-self.step_size(step) // (self.micro_batch_size * self.num_processes))

    def global_steps(self, epoch: int) -> list[np.ndarray]:
        """Clips of each optimizer step over all processes; the same for any number of them.

        Args:
            epoch: from 0.

        Returns: one integer array of example indices per step.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        blurred = self.lengths * rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(order))
        num_full, num_rest = divmod(len(order), self.batch_size)
        pool_size = max(1, POOL_CLIPS // self.batch_size) * self.batch_size
        # What doesn't fill a pool joins the last one.
        cuts = range(pool_size, num_full * self.batch_size, pool_size)
        pools = [pool[np.argsort(blurred[pool])] for pool in np.split(order, list(cuts))]
        # The clips left over are a run of similar lengths too, from anywhere: not always the longest or the shortest.
        last = pools[-1]
        start = rng.integers(len(last) // self.batch_size + 1) * self.batch_size
        rest, pools[-1] = last[start : start + num_rest], np.delete(last, slice(start, start + num_rest))
        steps = [step for pool in pools if len(pool) for step in np.split(pool, len(pool) // self.batch_size)]
        steps = [steps[i] for i in rng.permutation(num_full)]
        return [*steps, rest] if num_rest else steps

    def deal(self, clips: np.ndarray) -> list[list[np.ndarray]]:
        """Share one step's clips out: for every process its micro-batches, some perhaps empty.

        Micro-batches are neighbours in the order of length; the k-th ones of all processes are as long as each other,
        and the processes take turns at the longer ones.
        """
        clips = self._by_length(clips)
        num_rounds = -(-len(clips) // (self.micro_batch_size * self.num_processes))
        micro_batches = np.array_split(clips, num_rounds * self.num_processes)
        rounds = [micro_batches[r * self.num_processes : (r + 1) * self.num_processes] for r in range(num_rounds)]
        rounds = [one[::-1] if r % 2 else one for r, one in enumerate(rounds)]
        return [[one[process] for one in rounds] for process in range(self.num_processes)]

    def groups(self, clips: np.ndarray) -> dict[int, tuple[int, ...]]:
        """The clips each of a step's clips may share its conditioning with; the same for any number of processes."""
        size = self.conditioning_group
        ordered = [int(clip) for clip in self._by_length(clips)]
        groups = [tuple(ordered[start : start + size]) for start in range(0, len(ordered), size)]
        return {clip: group if len(group) > 1 else () for group in groups for clip in group}

    def _by_length(self, clips: np.ndarray) -> np.ndarray:
        """From long to short."""
        return clips[np.lexsort((clips, -self.lengths[clips]))]

    def steps(self, epoch: int) -> list[list[list[Draw]]]:
        """This process's share of an epoch.

        Args:
            epoch: from 0.

        Returns: optimizer steps; each a list of micro-batches; each a list of at least one draw. Where this process has
            no clip, the micro-batch holds the step's shortest clip with weight 0.
        """
        plan = []
        for clips in self.global_steps(epoch):
            filler = Draw(int(clips[np.argmin(self.lengths[clips])]), epoch, 0)
            groups = self.groups(clips)
            shares = self.deal(clips)[self.process_index]
            plan.append([[Draw(int(i), epoch, 1, groups[int(i)]) for i in share] or [filler] for share in shares])
        return plan

    def iterate(self, start_epoch: int = 0, start_step: int = 0) -> Iterator[list[Draw]]:
        """This process's micro-batches without end, for the `batch_sampler` of a `DataLoader`.

        Args:
            start_epoch: epoch to begin with, from 0.
            start_step: optimizer step inside that epoch, from 0; `steps_per_epoch` begins with the next epoch.

        Yields: lists of draws; `num_micro_batches(step)` of them make an optimizer step.
        """
        for epoch in itertools.count(start_epoch):
            first = start_step if epoch == start_epoch else 0
            for micro_batches in self.steps(epoch)[first:]:
                yield from micro_batches

    def padding_share(self, epoch: int = 0) -> float:
        """Share of all positions that would be padding if rows were padded to the longest of their micro-batch.

        Over all processes; rows of weight 0 are padding as a whole. Training pads nothing on a CPU, and nothing but
        attention on a GPU.
        """
        total = 0
        for clips in self.global_steps(epoch):
            shortest = self.lengths[clips].min()
            for share in itertools.chain.from_iterable(self.deal(clips)):
                total += self.lengths[share].max() * len(share) if len(share) else shortest
        return float(1 - self.lengths.sum() / total)
