"""Micro-batches for the loop: the plan of the sampler, fetched and collated by torch's DataLoader.

The loaders are not given to `Accelerator.prepare`: the sampler has dealt the clips to processes already, and a position
in the run is a step number, so resuming in the middle of an epoch needs no replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from tortoise_hf.config import Config
from tortoise_hf.data.collate import Batch, Collator, ExampleDataset
from tortoise_hf.data.conditioning import ConditioningDraws
from tortoise_hf.data.sampler import Draw, StepSampler

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from tortoise_hf.models.gpt import GPTConfig

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

    def clip_id(self, index: int) -> str:
        """Name of an example, for messages."""
        names = getattr(self.dataset, "clip_ids", None)
        return names[index] if names is not None else f"example {index}"

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


def build_batches(
    cfg: Config,
    accelerator: Accelerator,
    train_examples: datasets.Dataset,
    eval_examples: datasets.Dataset,
    mel_norms: torch.Tensor,
    gpt: GPTConfig,
) -> tuple[TrainBatches, EvalBatches]:
    """This process's micro-batches for training and evaluation.

    Args:
        cfg: the experiment.
        accelerator: how many processes there are and which one this is.
        train_examples: prepared examples, at least one.
        eval_examples: prepared examples, perhaps none; they may be conditioned on training clips.
        mel_norms: (80,) norms of the mel front end; silence in conditioning clips follows from them.
        gpt: sizes and ids of the model.
    """
    data, training = cfg.data, cfg.training
    collate = Collator.for_model(gpt, data.padding)
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}

    def dataset_of(examples: datasets.Dataset, pool: datasets.Dataset | None, seed: int) -> ExampleDataset:
        draws = ConditioningDraws(
            examples, mel_norms, data.num_conditioning_clips, data.conditioning_seconds, seed, pool
        )
        dataset = ExampleDataset(examples, draws)
        dataset.clip_ids = examples["clip_id"]
        return dataset

    train_batches = TrainBatches(
        dataset_of(train_examples, None, training.seed),
        StepSampler(
            train_examples["num_positions"],
            training.batch_size,
            training.micro_batch_size,
            seed=training.seed,
            conditioning_group=data.conditioning_group,
            **processes,
        ),
        collate,
        data.num_workers,
    )
    if len(eval_examples) == 0:
        return train_batches, EvalBatches(train_batches.dataset, None, collate)
    eval_batches = EvalBatches(
        # A fixed seed: evaluations of different runs on the same clips hear the same conditioning.
        dataset_of(eval_examples, train_examples, seed=0),
        StepSampler(eval_examples["num_positions"], len(eval_examples), training.eval_batch_size, **processes),
        collate,
        data.num_workers,
    )
    return train_batches, eval_batches
