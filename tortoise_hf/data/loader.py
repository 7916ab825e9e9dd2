"""Micro-batches for the loop: the plan of the sampler, fetched and collated by torch's DataLoader.

The loaders are not given to `Accelerator.prepare`: the sampler has dealt the clips to processes already, and a position
in the run is a step number, so resuming in the middle of an epoch needs no replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from tortoise_hf.data.collate import Batch
from tortoise_hf.data.sampler import Draw, StepSampler

Collate = Callable[[list], Batch]


class _MicroBatches:
    """Lets DataLoader walk a list or generator of micro-batches."""

    def __init__(self, make: Callable[[], Iterator[list[Draw]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.make()


def _data_loader(dataset: Dataset, micro_batches: _MicroBatches, collate: Collate, num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=micro_batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: otherwise every new iterator draws from the global one and a resumed run differs.
        generator=torch.Generator(),
    )


class TrainBatches:
    """This process's micro-batches, grouped into the optimizer steps of the run."""

    def __init__(self, dataset: Dataset, sampler: StepSampler, collate: Collate, num_workers: int = 0) -> None:
        """Take the clips of `sampler`'s steps from `dataset` and put them together with `collate`."""
        self.dataset, self.sampler, self.collate, self.num_workers = dataset, sampler, collate, num_workers

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every clip once."""
        return self.sampler.steps_per_epoch

    def num_clips(self, step: int) -> int:
        """Clips of the run's step number `step` (from 0), over all processes."""
        return self.sampler.step_size(step % self.steps_per_epoch)

    def steps(self, start: int = 0) -> Iterator[list[Batch]]:
        """Endless optimizer steps, each a list of micro-batches.

        Args:
            start: finished optimizer steps of the run; 0 begins it.
        """
        epoch, step = divmod(start, self.steps_per_epoch)
        plan = _MicroBatches(lambda: self.sampler.iterate(epoch, step))
        loader = iter(_data_loader(self.dataset, plan, self.collate, self.num_workers))
        while True:
            yield [next(loader) for _ in range(self.sampler.num_micro_batches(step))]
            step = (step + 1) % self.steps_per_epoch


class EvalBatches:
    """This process's share of the evaluation clips, always drawn the same way."""

    def __init__(self, dataset: Dataset, sampler: StepSampler | None, collate: Collate, num_workers: int = 0) -> None:
        """Take epoch 0 of `sampler`, which holds every clip once; None stands for an empty evaluation set."""
        self.dataset, self.collate, self.num_workers = dataset, collate, num_workers
        plan = sampler.steps(0) if sampler else []
        self.plan = [micro_batch for step in plan for micro_batch in step]

    def __len__(self) -> int:
        """Micro-batches of this process."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """Collated micro-batches."""
        return iter(_data_loader(self.dataset, _MicroBatches(lambda: iter(self.plan)), self.collate, self.num_workers))
