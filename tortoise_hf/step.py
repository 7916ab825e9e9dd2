"""One optimizer step: gradients of all its clips, clipping, the move; and what is done if it fails.

Running out of memory halves the micro-batches and does the same step again; NaN leaves the weights where they are.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerState

from tortoise_hf.checkpoint import MICRO_BATCH, rng_state, set_rng_state
from tortoise_hf.config import Config
from tortoise_hf.data.collate import Batch
from tortoise_hf.data.loader import TrainBatches
from tortoise_hf.distributed import any_process, average_gradients, shards_weights
from tortoise_hf.errors import UserError
from tortoise_hf.faults import GO_ON, StepOutOfMemory, is_out_of_memory
from tortoise_hf.loss import LossSums, gpt_loss, weighted_mean
from tortoise_hf.optim import clip_gradients

MAX_SKIPPED_STEPS = 10
"""Steps in a row with a NaN or infinite gradient before the run gives up. Source: the reference trainer's limit."""


@dataclass
class StepResult:
    """What one optimizer step did."""

    loss_values: torch.Tensor
    """(4,) float64 on the device: `LossSums.values()` summed over this process's micro-batches."""
    grad_norms: torch.Tensor
    """(G,) gradient norms before clipping, on the device."""
    skipped: bool
    """True if a NaN or overflow kept the weights where they were."""
    unusable: list[int]
    """Of a skipped step, rows of the examples in this process's micro-batches whose loss was NaN or infinite."""


class Steps:
    """The run's optimizer steps in order, taken one by one."""

    def __init__(
        self,
        cfg: Config,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: TrainBatches,
        state: TrainerState,
    ) -> None:
        """Begin after `state.global_step` steps, with the micro-batch size the run fell back to, if it did."""
        self.cfg, self.accelerator, self.model, self.optimizer = cfg, accelerator, model, optimizer
        self.batches, self.state = batches, state
        self.skipped_in_a_row = 0
        self._asked = batches.sampler.micro_batch_size
        found = state.stateful_callbacks.get(MICRO_BATCH)
        if found and found["asked"] == self._asked and found["used"] < self._asked:
            batches.sampler.micro_batch_size = found["used"]
            accelerator.print(f"Micro-batches of {found['used']} clips: at {self._asked} memory had run out.")
        self._fetch()

    def take(self) -> StepResult:
        """Do the next step; `state.global_step` is still the number of finished ones.

        Raises:
            UserError: if ten steps in a row had no usable gradient, or a single clip doesn't fit into memory.
        """
        result = None
        while result is None:
            micro_batches, before = next(self._steps), rng_state()
            try:
                result = optimizer_step(self.cfg, self.accelerator, self.model, self.optimizer, micro_batches)
            except StepOutOfMemory as error:
                reason = str(error)
            if result is None:  # outside `except`: the exception would keep the step's tensors alive
                del micro_batches
                self._halve(reason)
                set_rng_state(before)
                self._fetch()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            self._report_skip(result, micro_batches)
        return result

    def _fetch(self) -> None:
        self._steps: Iterator[list[Batch]] = self.batches.steps(start=self.state.global_step)

    def _halve(self, reason: str) -> None:
        self.optimizer.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        sampler, number = self.batches.sampler, self.state.global_step + 1
        advice = "Set model.gradient_checkpointing true, take bf16 or fp16, or lower data.max_samples"
        if sampler.micro_batch_size == 1:
            raise UserError(f"Step {number}: out of memory with a single clip ({reason}). {advice}. {GO_ON}")
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            # Its processes exchange weights in the middle of the step: they can't all turn back at the same point.
            raise UserError(
                f"Step {number}: out of memory with micro-batches of {sampler.micro_batch_size} clips ({reason}). "
                f"Lower training.micro_batch_size to {sampler.micro_batch_size // 2}, or: {advice}. {GO_ON}"
            )
        before, sampler.micro_batch_size = sampler.micro_batch_size, sampler.micro_batch_size // 2
        self.state.stateful_callbacks[MICRO_BATCH] = {"asked": self._asked, "used": sampler.micro_batch_size}
        self.accelerator.print(
            f"Step {number}: out of memory with micro-batches of {before} clips; the step is done again with "
            f"{sampler.micro_batch_size}, and so are all that follow. Each step still sees {sampler.batch_size} clips."
        )

    def _report_skip(self, result: StepResult, micro_batches: list[Batch]) -> None:
        """Name the clips of a step without a usable gradient; give up after ten in a row."""
        number, accelerator = self.state.global_step + 1, self.accelerator
        # A scaler starts high and finds its level by skipping; that is no sign of trouble until it has gone down far.
        limit = MAX_SKIPPED_STEPS if accelerator.scaler is None else 4 * MAX_SKIPPED_STEPS
        if accelerator.scaler is None or self.skipped_in_a_row > MAX_SKIPPED_STEPS:
            own = result.unusable or [int(index) for batch in micro_batches for index in batch.indices]
            found = gather_object([(bool(result.unusable), own)])
            worst = any(loss for loss, _ in found)
            clips = sorted({self.batches.clip_id(index) for loss, own in found if loss == worst for index in own})
            what = "loss" if worst else "gradient"
            accelerator.print(
                f"Step {number}: the {what} was NaN or infinite, the weights stay as they are. Clips: "
                f"{', '.join(clips[:20])}{f' and {len(clips) - 20} more' if len(clips) > 20 else ''}."
            )
        if self.skipped_in_a_row >= limit:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row up to step {number} had NaN or infinite gradients; the "
                "last checkpoint is intact. Lower optim.learning_rate, or use bf16 or no mixed precision instead of "
                "fp16."
            )


def optimizer_step(
    cfg: Config,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
) -> StepResult:
    """One move of the weights over all micro-batches of all processes.

    The loss is divided by the number of targets in the whole step, so the gradient doesn't depend on how the step's
    clips were cut into micro-batches and processes. With `data.padding: stop` each micro-batch is averaged by itself
    and the micro-batches are averaged, as the reference trainer does.

    Raises:
        StepOutOfMemory: on every process, if one had too little memory; no weight has moved then.
    """
    values, problem = None, ""
    try:
        values = _backward(cfg, accelerator, model, micro_batches)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).strip().split("\n")[0]
    if any_process(accelerator, values is None):
        raise StepOutOfMemory(problem or "on another process")
    if accelerator.num_processes > 1 and not shards_weights(accelerator):
        average_gradients(model.parameters(), accelerator.num_processes)
    accelerator.unscale_gradients()
    grad_norms = clip_gradients(optimizer, cfg.optim.max_grad_norm)
    # Under fp16 the scaler looks for overflow itself and skips; elsewhere one look at two numbers does.
    skipped = accelerator.scaler is None and not torch.isfinite(grad_norms).all()
    if not skipped:
        optimizer.step()
        skipped = accelerator.optimizer_step_was_skipped
    optimizer.zero_grad()
    unusable = []
    if skipped:
        for batch, row in zip(micro_batches, values, strict=True):
            unusable += [] if torch.isfinite(row).all() else batch.indices.tolist()
        values = values[torch.isfinite(values).all(dim=1)]  # what is logged are the losses that were numbers
    return StepResult(values.sum(dim=0), grad_norms, skipped, unusable)


def _backward(
    cfg: Config, accelerator: Accelerator, model: torch.nn.Module, micro_batches: list[Batch]
) -> torch.Tensor:
    """Gradients of this process's micro-batches, and their loss values (M, 4)."""
    step_counts = torch.tensor(
        [sum(batch.num_text_targets for batch in micro_batches), sum(batch.num_mel_targets for batch in micro_batches)],
        dtype=torch.float64,
        device=accelerator.device,
    )
    step_counts = accelerator.reduce(step_counts, reduction="sum")  # before anything that takes memory
    batches = [batch.to(accelerator.device) for batch in micro_batches]
    values = []
    for index, batch in enumerate(batches):
        # Sharded weights bring gradients together in the last backward pass. Whole ones keep them on their process
        # until everybody has got through: a process that runs out of memory half-way can then tell the others.
        last = shards_weights(accelerator) and index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            sums = gpt_loss(model, batch)
            loss = step_loss(cfg, sums, step_counts, len(batches), accelerator.num_processes)
            accelerator.backward(loss)
        values.append(sums.values())
    return torch.stack(values)


def step_loss(
    cfg: Config, sums: LossSums, step_counts: torch.Tensor, num_micro_batches: int, num_processes: int
) -> torch.Tensor:
    """This micro-batch's part of the step's loss; gradients are averaged over processes afterwards."""
    weights = cfg.optim.text_loss_weight, cfg.optim.mel_loss_weight
    if cfg.data.padding == "stop":
        return weighted_mean(sums, sums.counts(), *weights) / num_micro_batches
    return weighted_mean(sums, step_counts, *weights) * num_processes
