"""The training loop: fetch a step's clips, move the weights, let callbacks ask, answer.

Callbacks are transformers' `TrainerCallback`s; the loop knows none of them by name. All `_steps` are optimizer steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler  # internal to transformers; tests/test_loop.py covers it

from tortoise_hf.checkpoint import METER, remember_callbacks
from tortoise_hf.config import Config
from tortoise_hf.data.loader import EvalBatches, TrainBatches
from tortoise_hf.eval_loss import evaluate
from tortoise_hf.faults import in_words
from tortoise_hf.loss import weighted_mean_of_values
from tortoise_hf.step import StepResult, Steps


@in_words()
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
        UserError: if ten steps in a row had NaN or infinite gradients, or something failed that the user can mend.
    """
    args = cfg.training
    unwrapped = accelerator.unwrap_model(model)
    events = CallbackHandler(callbacks, unwrapped, None, optimizer, lr_scheduler)
    events.eval_dataloader = eval_batches
    control = events.on_train_begin(args, state, TrainerControl())
    meter = Meter(accelerator, cfg)
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
    steps = Steps(cfg, accelerator, model, optimizer, train_batches, state)
    while not control.should_training_stop:
        if state.global_step % train_batches.steps_per_epoch == 0:
            control = events.on_epoch_begin(args, state, control)
        control = events.on_step_begin(args, state, control)
        result = steps.take()
        meter.add(result, train_batches.num_clips(state.global_step))
        if not result.skipped:
            control = events.on_optimizer_step(args, state, control)
        state.global_step += 1
        state.epoch = state.global_step / train_batches.steps_per_epoch
        control = events.on_step_end(args, state, control)
        if state.global_step % train_batches.steps_per_epoch == 0:
            control = events.on_epoch_end(args, state, control)
        # One answer to both: a run stopped by a signal leaves here and must not owe the epoch its evaluation.
        control = answer(control)
    if last_evaluated != state.global_step and args.eval_strategy != "no":
        control.should_evaluate = True
    control = answer(control, log=meter.steps > 0)
    remember_callbacks(state, callbacks, meter.state())
    events.on_train_end(args, state, control)
    return state


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
    if state.global_step > 0 and math.isfinite(value) and (state.best_metric is None or value < state.best_metric):
        state.best_metric, state.best_global_step = value, state.global_step
    return control


def record(
    logs: dict[str, float], events: CallbackHandler, cfg: Config, state: TrainerState, control: TrainerControl
) -> TrainerControl:
    """Put figures into the history and show them to callbacks, with the epoch they belong to."""
    logs = {**logs, "epoch": round(state.epoch, 4)}
    state.log_history.append({**logs, "step": state.global_step})
    return events.on_log(cfg.training, state, control, dict(logs))


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
        interval = {"steps": self.steps, "clips": self.clips, "values": values, "seconds": seconds}
        return {**interval, "grad_norms": self.grad_norms.tolist()}

    def restore(self, interval: dict[str, float | list[float]]) -> None:
        """Go on with an interval out of a checkpoint, or start a new one if it isn't whole."""
        self.reset()
        if "grad_norms" in interval:  # checkpoints of earlier versions lack them
            self.steps, self.clips = interval["steps"], interval["clips"]
            self._excluded = -interval["seconds"]
            # The sums hold every process's part already: one process takes them over, the others add nothing.
            share = interval["values"] if self.accelerator.is_main_process else [0.0] * 4
            device = self.accelerator.device
            self.values = torch.tensor(share, dtype=torch.float64, device=device)
            self.grad_norms = torch.tensor(interval["grad_norms"], dtype=torch.float64, device=device)

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
        # JSON knows no NaN; what wasn't a number is said in the message about the skipped step.
        return {name: value for name, value in logs.items() if math.isfinite(value)}


@dataclass
class _Pause:
    meter: Meter
    _entered: float = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.meter._excluded += time.perf_counter() - self._entered
