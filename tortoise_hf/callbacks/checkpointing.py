"""Saves checkpoints when asked, keeps the newest and the best, and makes sure a run's last step is on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

from tortoise_hf.checkpoint import check_space, rotate_checkpoints, save_checkpoint
from tortoise_hf.distributed import raise_together
from tortoise_hf.errors import UserError
from tortoise_hf.lora import num_weights
from tortoise_hf.optimizer_state import optimizer_of


class CheckpointCallback(TrainerCallback):
    """Write a checkpoint at every save, at every new best evaluation and after the last step."""

    def __init__(self, accelerator: Accelerator, keep_last: int, held: tuple[int, int] = (0, 0)) -> None:
        """Keep the newest `keep_last` checkpoints, and the best one besides.

        Args:
            accelerator: of this process.
            keep_last: see above.
            held: files of weights, and checkpoints, that pushes may hold on to at once, see `check_space`.
        """
        self.accelerator = accelerator
        self.keep_last, self.held = keep_last, held
        self.saved_step: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Refuse to begin what the disk has no room for; a resumed run starts on a step that is on disk already.

        Raises:
            UserError: on every process, with the figures.
        """
        self.saved_step = state.global_step if state.global_step > 0 else None
        problem = None
        weights, trained = num_weights(model)
        if self.accelerator.is_main_process:
            try:
                figures = (weights, args.optimizer_state, self.keep_last, *self.held, trained)
                print(check_space(Path(args.output_dir), *figures, optimizer_of(optimizer.param_groups)))
            except UserError as error:
                problem = str(error)
        raise_together(self.accelerator, problem)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        """Ask for a save if this is the best evaluation so far (the one before the first step doesn't count)."""
        value = metrics[args.metric_for_best_model]
        if state.global_step > 0 and math.isfinite(value) and (state.best_metric is None or value < state.best_metric):
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write, then delete what is neither new nor best."""
        self._save(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the last step if it isn't on disk; delete what a process left that was killed after its last save."""
        if self.saved_step != state.global_step:
            self._save(args, state, **kwargs)
        else:
            self._rotate(args, state)

    def _save(self, args: Any, state: Any, *, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
        output_dir = Path(args.output_dir)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = f"checkpoint-{state.global_step}"
        save_checkpoint(output_dir, self.accelerator, model, optimizer, lr_scheduler, state, args.optimizer_state)
        self.saved_step = state.global_step
        self._rotate(args, state)

    def _rotate(self, args: Any, state: Any) -> None:
        if self.accelerator.is_main_process:
            rotate_checkpoints(Path(args.output_dir), self.keep_last, {state.best_model_checkpoint or ""})
