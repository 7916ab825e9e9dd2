"""What a training step costs, beside the reference's: clips and tokens per second, utilisation, memory, padding.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/train_step.py --size released --micro_batch_size 4 --repeats 1
    python benchmarks/train_step.py --size released --precision bf16 --micro_batch_size 32 --micro_batches 4

Both train on the same clips, whose lengths are LJSpeech's, with the weights of one model: the reference as
reference_step.py tells, from recordings; ours from prepared examples, through the code of a run. The variants take
turns. A turn is the gradients of a few micro-batches and one move of the weights; that move is timed apart as well, for
`clips_per_second` counts one for `--batch_size` clips, as a run makes it. Micro-batches stand for an epoch: they are
taken from its plan at even distances in the order of length.

Utilisation is what `flops.py` counts (real tokens alone, nothing recomputed) per second of a turn without the move, by
what the device reached with large matrices of the same precision in the same run. On a CPU both go by the processor's
time, so that what else runs on the machine doesn't count.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flops
import numpy as np
import synthetic
import torch
from accelerate import Accelerator
from measuring import Cost, add_common_arguments, alternate, finish, matrix_rate, measured, medians, table, wait_for
from reference_step import (
    BATCH_SIZE,
    CONDITIONING_CLIPS,
    CONDITIONING_SAMPLES,
    PADDED_SAMPLES,
    RawClips,
    ReferenceStep,
    collate,
    set_precision,
)
from sizes import SIZES
from torch.utils.data import DataLoader, Dataset

from tortoise_hf.audio import HOP_LENGTH, SAMPLES_PER_CODE, num_codes
from tortoise_hf.config import CallbackConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainingConfig
from tortoise_hf.data.collate import IGNORE_INDEX, Batch, Collator, ExampleDataset
from tortoise_hf.data.conditioning import ConditioningDraws
from tortoise_hf.data.loader import TrainBatches
from tortoise_hf.data.sampler import Draw, StepSampler
from tortoise_hf.machine import set_gradient_checkpointing
from tortoise_hf.models.conditioning import ClipRow
from tortoise_hf.models.dvae import DVAE
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.optim import build_optimizer
from tortoise_hf.step import optimizer_step

REFERENCE = "reference"


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    batching: str
    """grouped: micro-batches of a run. random: of clips as they come."""
    group: int
    """Rows that share their conditioning (data.conditioning_group)."""
    checkpointing: bool
    compiled: bool

    @property
    def name(self) -> str:
        """For tables."""
        words = ["ours", self.batching, f"conditioning shared by {self.group}"]
        return ", ".join(words + ["checkpointing"] * self.checkpointing + ["compiled"] * self.compiled)


@dataclass(frozen=True)
class Work:
    """What a turn is worth."""

    computed_positions: int
    """Of all rows, padding included."""
    operations: int
    """That the GPT needs for the real ones; of the reference, for what it pads besides nothing."""


class UpdateTimer:
    """Times the moves of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.seconds, self.cpu_seconds, self._device = [], [], device
        optimizer.register_step_pre_hook(lambda *_: self._begin())
        optimizer.register_step_post_hook(lambda *_: self._end())

    def _begin(self) -> None:
        wait_for(self._device)
        self._began = time.perf_counter(), time.process_time()

    def _end(self) -> None:
        wait_for(self._device)
        self.seconds.append(time.perf_counter() - self._began[0])
        self.cpu_seconds.append(time.process_time() - self._began[1])


class Trainer:
    """The model, the clips and both ways to train."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Make models and clips; `folder` is where the clips are kept."""
        self.args, self.device = args, torch.device(args.device)
        self.accelerator = Accelerator(mixed_precision=args.precision, cpu=self.device.type == "cpu")
        set_precision()
        self.config, self.dvae_config = SIZES[args.size]
        self.cfg = Config(
            data=DataConfig(root="."), model=ModelConfig(), optim=OptimConfig(),
            training=TrainingConfig(output_dir=str(folder)), callbacks=CallbackConfig(),
        )  # fmt: skip
        shapes = synthetic.ljspeech_shapes(args.clips)
        ids = self.config.num_text_tokens, self.config.num_mel_codes
        examples = synthetic.prepared_examples(folder / "prepared", shapes, *ids)
        draws = ConditioningDraws(
            examples, synthetic.random_norms(), args.conditioning_clips, args.conditioning_seconds
        )
        self.dataset, self.lengths = ExampleDataset(examples, draws), np.array(examples["num_positions"])
        self.grouped = {group: self._typical_micro_batches(group) for group in (1, *args.conditioning_group)}
        chosen = [draw for one in self.grouped[1] for draw in one]
        parts = np.array_split(np.random.default_rng(0).permutation(len(chosen)), args.micro_batches)
        self.real_positions = int(sum(self.lengths[draw.index] for draw in chosen))

        rows = [draw.index for draw in chosen]
        self.shapes = synthetic.Shapes(shapes.num_samples[rows], shapes.num_text_ids[rows])
        synthetic.write_raw_folder(folder / "raw", self.shapes)
        paths = sorted((folder / "raw" / "wavs").iterdir())
        texts = [torch.randint(2, ids[0], (int(count),)) for count in self.shapes.num_text_ids]
        self.raw_clips = RawClips(list(zip(paths, texts, strict=True)))
        self.raw_batches = [part.tolist() for part in parts]

        torch.manual_seed(0)
        self.model = TortoiseGPT(self.config).to(self.device).train()
        optimizer = build_optimizer(self.model, self.cfg.optim)
        self.updates = UpdateTimer(optimizer, self.device)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.work: dict[str, Work] = {}

    @property
    def num_clips(self) -> int:
        """Of a turn."""
        return len(self.raw_clips)

    def _typical_micro_batches(self, group: int) -> list[list[Draw]]:
        sizes = min(self.args.batch_size, len(self.lengths)), self.args.micro_batch_size
        sampler = StepSampler(self.lengths, *sizes, conditioning_group=group)
        plan = [one for step in sampler.steps(0) for one in step if len(one) == self.args.micro_batch_size]
        plan.sort(key=lambda one: sum(self.lengths[draw.index] for draw in one))
        count = self.args.micro_batches
        return [plan[(2 * part + 1) * len(plan) // (2 * count)] for part in range(count)]

    def _loader(self, dataset: Dataset, micro_batches: list, collate_fn: Callable) -> DataLoader:
        options = {"num_workers": self.args.num_workers, "pin_memory": self.device.type == "cuda"}
        return DataLoader(dataset, batch_sampler=micro_batches, collate_fn=collate_fn, **options)

    def ours(self, variant: Variant) -> Callable[[], None]:
        """A turn of one of our ways."""
        chosen = self.grouped[variant.group]
        if variant.batching == "random":
            draws = [draw for one in chosen for draw in one]
            chosen = [[draws[place] for place in part] for part in self.raw_batches]
        collator = Collator.for_model(self.config)
        self.work[variant.name] = self._count([collator(self.dataset.__getitems__(one)) for one in chosen])
        if variant.compiled:
            for block in self.model.gpt.h:
                block.compile(dynamic=True)

        def turn() -> None:
            self._become(variant)
            with torch.compiler.set_stance("default" if variant.compiled else "force_eager"):
                batches = list(self._loader(self.dataset, chosen, collator))
                optimizer_step(self.cfg, self.accelerator, self.prepared, self.optimizer, batches)

        return turn

    def epoch(self, variant: Variant) -> dict[str, float]:
        """All steps of an epoch over the dataset, fetched and done as a run does them."""
        sizes = min(self.args.batch_size, len(self.lengths)), self.args.micro_batch_size
        sampler = StepSampler(self.lengths, *sizes, conditioning_group=variant.group)
        batches = TrainBatches(self.dataset, sampler, Collator.for_model(self.config), self.args.num_workers)

        def whole() -> None:
            self._become(variant)
            with torch.compiler.set_stance("default" if variant.compiled else "force_eager"):
                steps = batches.steps()
                for _ in range(batches.steps_per_epoch):
                    optimizer_step(self.cfg, self.accelerator, self.prepared, self.optimizer, next(steps))

        cost = measured(whole, self.device)
        return {"steps": batches.steps_per_epoch, "clips": len(self.lengths), "seconds": cost.seconds}

    def _become(self, variant: Variant) -> None:
        set_gradient_checkpointing(self.model, variant.checkpointing)

    def _count(self, batches: list[Batch]) -> Work:
        rows, windows = [], []
        for batch in batches:
            for text, mel in zip(batch.text_targets, batch.mel_targets, strict=True):
                rows.append((int((text != IGNORE_INDEX).sum()), int((mel != IGNORE_INDEX).sum())))
            mels = batch.conditioning_mel.flatten(0, 1)
            row = ClipRow.find(mels)
            windows += [mels.shape[-1]] * len(mels) if row is None else row.lengths
        positions = sum(batch.packing.num_positions for batch in batches)
        return Work(positions, flops.training(self.config, rows, windows))

    def reference(self) -> Callable[[], None]:
        """A turn of the reference, with the same weights and optimizer."""
        dvae, norms = DVAE(self.dvae_config), synthetic.random_norms()
        step = ReferenceStep(self.model, dvae, norms, self.optimizer.optimizer, self.device)
        longest = [int(self.shapes.num_text_ids[part].max()) for part in self.raw_batches]
        mel_positions = PADDED_SAMPLES // SAMPLES_PER_CODE + 1 + 2
        positions = [
            len(part) * (CONDITIONING_CLIPS + count + 2 + mel_positions)
            for part, count in zip(self.raw_batches, longest, strict=True)
        ]
        rows = [(int(text) + 2, num_codes(int(samples)) + 1)
                for text, samples in zip(self.shapes.num_text_ids, self.shapes.num_samples, strict=True)]  # fmt: skip
        frames = CONDITIONING_SAMPLES // HOP_LENGTH + 1
        operations = flops.training(self.config, rows, [frames] * CONDITIONING_CLIPS * len(rows))
        self.work[REFERENCE] = Work(sum(positions), operations)

        def turn() -> None:
            with step.in_charge(), torch.compiler.set_stance("force_eager"):
                for batch in self._loader(self.raw_clips, self.raw_batches, collate):
                    step.micro_batch(batch, len(self.raw_batches))
                step.update()

        return turn

    def row(self, name: str, cost: Cost, update: Cost, rate: float) -> dict[str, object]:
        """A variant's line of the table."""
        work, batch_size = self.work[name], self.args.batch_size
        share = batch_size / self.num_clips
        gradients, computing = cost.seconds - update.seconds, cost.cpu_seconds - update.cpu_seconds
        seconds = share * gradients + update.seconds
        return {
            "variant": name,
            "clips_per_second": batch_size / seconds,
            "computing_seconds_per_clip": (share * computing + update.cpu_seconds) / batch_size,
            "real_tokens_per_second": share * self.real_positions / seconds,
            "utilisation": work.operations / (computing if self.device.type == "cpu" else gradients) / rate,
            "peak_gib": cost.peak_bytes / 2**30,
            "padding_share": 1 - self.real_positions / work.computed_positions,
            "turn_seconds": cost.seconds,
            "update_seconds": update.seconds,
        }  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="of ours; no: float32")
    parser.add_argument("--batching", nargs="+", choices=("grouped", "random"), default=["grouped"])
    parser.add_argument("--conditioning_group", type=int, nargs="+", default=[1, 8], help="data.conditioning_group")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--clips", type=int, default=1024, help="of the dataset that batches are planned for")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="clips of an optimizer step")
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--micro_batches", type=int, default=4, help="of a turn")
    parser.add_argument("--conditioning_clips", type=int, default=DataConfig(root=".").num_conditioning_clips)
    parser.add_argument("--conditioning_seconds", type=float, default=DataConfig(root=".").conditioning_seconds)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each variant that are measured")
    parser.add_argument("--warm_up", type=int, default=1, help="turns of each before those")
    parser.add_argument("--no_reference", action="store_true")
    parser.add_argument("--epoch", action="store_true", help="also a whole epoch over --clips clips")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    ways = itertools.product(args.batching, args.conditioning_group, args.checkpointing, args.compile)
    with tempfile.TemporaryDirectory(prefix="tortoise_hf_train_step_") as folder:
        trainer = Trainer(args, Path(folder))
        variants = {} if args.no_reference else {REFERENCE: trainer.reference()}
        epochs = {}
        for batching, group, checkpointing, compiled in ways:
            variant = Variant(batching, group, checkpointing == "on", compiled == "on")
            variants[variant.name] = trainer.ours(variant)
            if args.epoch:
                epochs[variant.name] = partial(trainer.epoch, variant)
        costs = alternate(variants, args.repeats, device, args.warm_up)
        epochs = {name: run() for name, run in epochs.items()}
    update = Cost(min(trainer.updates.seconds), min(trainer.updates.cpu_seconds), 0)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rates = {"float32": matrix_rate(device, torch.float32, clock)}
    if args.precision != "no":
        half = torch.bfloat16 if args.precision == "bf16" else torch.float16
        rates[args.precision] = matrix_rate(device, half, clock)
    ours_rate = rates.get(args.precision, rates["float32"])
    rows = [
        trainer.row(name, medians(cost), update, rates["float32"] if name == REFERENCE else ours_rate)
        for name, cost in costs.items()
    ]
    if not args.no_reference:
        for row in rows:
            row["times_reference"] = row["clips_per_second"] / rows[0]["clips_per_second"]
            row["times_reference_computing"] = rows[0]["computing_seconds_per_clip"] / row["computing_seconds_per_clip"]
    turns = {name: [cost.seconds for cost in each] for name, each in costs.items()}
    result = finish(args, "train_step", device, rows, matrix_operations_per_second=rates, turns=turns, epochs=epochs)
    if epochs:
        print("\n" + table([{"variant": name, **found} for name, found in epochs.items()]))
    return result


if __name__ == "__main__":
    main()
