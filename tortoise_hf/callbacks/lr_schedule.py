"""Moves the learning rate."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class LRScheduleCallback(TrainerCallback):
    """Advance the learning-rate schedule once per optimizer step that really happened."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Called after the weights moved; steps that overflow or NaN gradients skipped don't get here."""
        lr_scheduler.step()
