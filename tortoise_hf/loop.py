"""The training loop: fetch a step's clips, move the weights, let callbacks ask, answer.

Callbacks are transformers' `TrainerCallback`s; the loop knows none of them by name. All `_steps` are optimizer steps.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler  # internal to transformers; tests/test_loop.py covers it

from tortoise_hf.checkpoint import METER, remember_callbacks
from tortoise_hf.config import Config
from tortoise_hf.data.collate import Batch
from tortoise_hf.data.loader import EvalBatches, TrainBatches
from tortoise_hf.errors import UserError
from tortoise_hf.evaluate import evaluate
from tortoise_hf.loss import LossSums, gpt_loss, weighted_mean, weighted_mean_of_values
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


def train(
    cfg: Config,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    train_batches: TrainBatches,
    eval_batches: EvalBatches,
    callbacks: list[TrainerCallback],
    state: TrainerState,
) -> TrainerState:
    """Train from `state.global_step` to `state.max_steps`, or until a callback stops the run.

    Args:
        cfg: the experiment.
        accelerator: devices, precision and processes, as launched.
        model: prepared by the accelerator.
        optimizer: prepared likewise.
        lr_scheduler: not prepared; a callback advances it.
        train_batches: this process's micro-batches, grouped into optimizer steps.
        eval_batches: this process's share of the evaluation clips.
        callbacks: in order of action.
        state: counters and log; fresh or out of a checkpoint.

    Returns:
        The state at the end.

    Raises:
        UserError: if ten steps in a row had NaN or infinite gradients.
    """
    args = cfg.training
    unwrapped = accelerator.unwrap_model(model)
    events = CallbackHandler(callbacks, unwrapped, None, optimizer, lr_scheduler)
    events.eval_dataloader = eval_batches
    control = events.on_train_begin(args, state, TrainerControl())
    meter = Meter(accelerator, cfg)
    skipped_steps = 0
    # A run interrupted after a save and before the evaluation of the same step still owes that evaluation.
    last_evaluated = max((entry["step"] for entry in state.log_history if "eval_loss" in entry), default=-1)

    def answer(control: TrainerControl, log: bool = False) -> TrainerControl:
        """Do what callbacks asked for: log, evaluate, save; in this order."""
        nonlocal last_evaluated
        if control.should_log or log:
            logs = meter.logs(state, lr_scheduler)
            control = record(logs, events, cfg, state, control)
        with meter.paused():
            if control.should_evaluate and len(eval_batches):
                control = run_evaluation(cfg, accelerator, unwrapped, eval_batches, events, state, control)
                last_evaluated = state.global_step
            if control.should_save:
                remember_callbacks(state, callbacks, meter.state())
                control = events.on_save(args, state, control)
        return control

    if state.global_step == 0 and args.eval_strategy != "no" and len(eval_batches):
        control = run_evaluation(cfg, accelerator, unwrapped, eval_batches, events, state, control)
    model.train()
    meter.restore(state.stateful_callbacks.get(METER, {}))
    if state.global_step >= state.max_steps:
        control.should_training_stop = True
    steps = train_batches.steps(start=state.global_step)
    while not control.should_training_stop:
        if state.global_step % train_batches.steps_per_epoch == 0:
            control = events.on_epoch_begin(args, state, control)
        control = events.on_step_begin(args, state, control)
        micro_batches = next(steps)
        result = optimizer_step(cfg, accelerator, model, optimizer, micro_batches)
        meter.add(result, train_batches.num_clips(state.global_step))
        if result.skipped:
            skipped_steps += 1
            stop_if_hopeless(accelerator, skipped_steps, micro_batches, state)
        else:
            skipped_steps = 0
            control = events.on_optimizer_step(args, state, control)
        state.global_step += 1
        state.epoch = state.global_step / train_batches.steps_per_epoch
        control = events.on_step_end(args, state, control)
        control = answer(control)
        if state.global_step % train_batches.steps_per_epoch == 0:
            control = answer(events.on_epoch_end(args, state, control))
    if meter.steps > 0:
        control = answer(control, log=True)
    if last_evaluated != state.global_step and args.eval_strategy != "no" and len(eval_batches):
        control = run_evaluation(cfg, accelerator, unwrapped, eval_batches, events, state, control)
    remember_callbacks(state, callbacks, meter.state())
    events.on_train_end(args, state, control)
    return state


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
    """
    batches = [batch.to(accelerator.device) for batch in micro_batches]
    step_counts = torch.tensor(
        [sum(batch.num_text_targets for batch in batches), sum(batch.num_mel_targets for batch in batches)],
        dtype=torch.float64,
        device=accelerator.device,
    )
    step_counts = accelerator.reduce(step_counts, reduction="sum")
    values = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(batches):
        # Gradients of all but the last micro-batch stay on their process; the last one brings everybody's together.
        local = nullcontext() if index == len(batches) - 1 else accelerator.no_sync(model)
        with local:
            output = model(**batch.model_inputs())
            sums = gpt_loss(output.text_logits, output.mel_logits, batch.text_targets, batch.mel_targets)
            loss = step_loss(cfg, sums, step_counts, len(batches), accelerator.num_processes)
            accelerator.backward(loss)
        values += sums.values()
    accelerator.unscale_gradients()
    grad_norms = clip_gradients(optimizer, cfg.optim.max_grad_norm)
    # Under fp16 the scaler looks for overflow itself and skips; elsewhere one look at two numbers does.
    if accelerator.scaler is None and not torch.isfinite(grad_norms).all():
        optimizer.zero_grad()
        return StepResult(values, grad_norms, skipped=True)
    optimizer.step()
    skipped = accelerator.optimizer_step_was_skipped
    optimizer.zero_grad()
    return StepResult(values, grad_norms, skipped=skipped)


def step_loss(
    cfg: Config, sums: LossSums, step_counts: torch.Tensor, num_micro_batches: int, num_processes: int
) -> torch.Tensor:
    """This micro-batch's part of the step's loss; gradients are averaged over processes afterwards."""
    weights = cfg.optim.text_loss_weight, cfg.optim.mel_loss_weight
    if cfg.data.padding == "stop":
        return weighted_mean(sums, sums.counts(), *weights) / num_micro_batches
    return weighted_mean(sums, step_counts, *weights) * num_processes


def run_evaluation(
    cfg: Config,
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: EvalBatches,
    events: CallbackHandler,
    state: TrainerState,
    control: TrainerControl,
) -> TrainerControl:
    """Evaluate, log, tell callbacks, and only then move the best metric: early stopping compares with the old one."""
    args = cfg.training
    metrics = evaluate(
        accelerator, model, batches, cfg.optim, on_batch=lambda: events.on_prediction_step(args, state, control)
    )
    control = record(metrics, events, cfg, state, control)
    control = events.on_evaluate(args, state, control, dict(metrics))
    value = metrics[args.metric_for_best_model]
    if state.global_step > 0 and (state.best_metric is None or value < state.best_metric):
        state.best_metric, state.best_global_step = value, state.global_step
    return control


def record(
    logs: dict[str, float], events: CallbackHandler, cfg: Config, state: TrainerState, control: TrainerControl
) -> TrainerControl:
    """Put figures into the history and show them to callbacks, with the epoch they belong to."""
    logs = {**logs, "epoch": round(state.epoch, 4)}
    state.log_history.append({**logs, "step": state.global_step})
    return events.on_log(cfg.training, state, control, dict(logs))


def stop_if_hopeless(
    accelerator: Accelerator, skipped_steps: int, micro_batches: list[Batch], state: TrainerState
) -> None:
    """Name the clips of a step without a usable gradient; give up after ten in a row."""
    # A scaler starts high and finds its level by skipping; its skips are no sign of trouble until it has gone down far.
    limit = MAX_SKIPPED_STEPS if accelerator.scaler is None else 4 * MAX_SKIPPED_STEPS
    indices = sorted({int(index) for batch in micro_batches for index in batch.indices})
    if accelerator.scaler is None:
        accelerator.print(
            f"step {state.global_step + 1}: the gradient was NaN or infinite, the weights stay as they are "
            f"(example numbers on this process: {indices})"
        )
    if skipped_steps >= limit:
        raise UserError(
            f"{skipped_steps} steps in a row up to step {state.global_step + 1} had NaN or infinite gradients; the "
            "last checkpoint is intact. Lower optim.learning_rate, or use bf16 or no mixed precision instead of fp16."
        )


@dataclass
class Meter:
    """Adds up what happens between two log lines; figures wait on the device until they are logged."""

    accelerator: Accelerator
    cfg: Config
    steps: int = 0
    clips: int = 0
    seconds_per_step: float | None = None
    values: torch.Tensor | None = None
    grad_norms: torch.Tensor | None = None
    _started: float = field(default_factory=time.perf_counter)
    _excluded: float = 0.0

    def reset(self) -> None:
        """Start the next interval."""
        self.steps, self.clips, self.values, self.grad_norms = 0, 0, None, None
        self._started, self._excluded = time.perf_counter(), 0.0

    def state(self) -> dict[str, float | list[float]]:
        """The interval so far, summed over processes, so that a resumed run logs what an unbroken one would."""
        if self.values is None:
            return {}
        values = self.accelerator.reduce(self.values, reduction="sum").tolist()
        seconds = time.perf_counter() - self._started - self._excluded
        return {"steps": self.steps, "clips": self.clips, "values": values, "seconds": seconds}

    def restore(self, interval: dict[str, float | list[float]]) -> None:
        """Go on with an interval out of a checkpoint, or start a new one if it is empty."""
        self.reset()
        if interval:
            self.steps, self.clips = interval["steps"], interval["clips"]
            self._excluded = -interval["seconds"]
            # The sums hold every process's part already: one process takes them over, the others add nothing.
            share = interval["values"] if self.accelerator.is_main_process else [0.0] * 4
            self.values = torch.tensor(share, dtype=torch.float64, device=self.accelerator.device)

    def add(self, result: StepResult, num_clips: int) -> None:
        """Count one optimizer step of `num_clips` clips (all processes together)."""
        self.steps += 1
        self.clips += num_clips
        self.values = result.loss_values if self.values is None else self.values + result.loss_values
        self.grad_norms = result.grad_norms

    def paused(self) -> _Pause:
        """Context in which time doesn't count as training time."""
        return _Pause(self)

    def logs(self, state: TrainerState, lr_scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
        """Figures of the interval, as plain numbers; waits for the device, gathers processes, starts a new interval."""
        values = self.accelerator.reduce(self.values, reduction="sum").cpu()
        optim = self.cfg.optim
        text_loss, mel_loss, loss = weighted_mean_of_values(values, optim.text_loss_weight, optim.mel_loss_weight)
        norms = self.grad_norms.tolist()
        seconds = max(1e-9, time.perf_counter() - self._started - self._excluded)
        self.seconds_per_step = seconds / self.steps
        logs = {
            "loss": loss,
            "mel_loss": mel_loss,
            "text_loss": text_loss,
            "learning_rate": lr_scheduler.get_last_lr()[0],
            "grad_norm": max(norms),
            "clips_per_second": self.clips / seconds,
            "tokens_per_second": float(values[2:].sum()) / seconds,
            "eta_seconds": round((state.max_steps - state.global_step) * self.seconds_per_step, 1),
        }
        self.reset()
        return logs


@dataclass
class _Pause:
    meter: Meter
    _entered: float = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.meter._excluded += time.perf_counter() - self._entered
