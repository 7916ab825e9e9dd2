"""Keeps a model near what it could do before: L2-SP, decoupled as AdamW's weight decay is.

A few minutes of one voice say little about most words. What they don't speak of stays as the base has it, because every
weight is drawn back there a little at each step; what they do speak of moves against the pull. Source: Li, Grandvalet
and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", 2018, whose penalty is moved
out of the gradient as Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, do with weight decay. An
adapter is drawn back to its own beginning, which adds nothing to the base.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from tortoise_hf.distributed import local_part


class DecayToStartCallback(TrainerCallback):
    """After every step, move each trained weight back to where it began, by learning rate x `rate` of the way.

    Stands before the callback that moves the learning rate: the pull goes by the rate that the step was taken with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Remember the weights as they are now: those of the base, so before a checkpoint is loaded.

        Args:
            optimizer: prepared, over the trained weights; of sharded ones each process keeps its own part.
            rate: `optim.decay_to_start`.
        """
        self.rate = rate
        with torch.no_grad():
            self.starts = [[local_part(value).clone() for value in group["params"]] for group in optimizer.param_groups]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Called after the weights moved; steps that overflow or NaN gradients skipped don't get here."""
        for group, starts in zip(optimizer.param_groups, self.starts, strict=True):
            weights = [local_part(value) for value in group["params"]]
            torch._foreach_lerp_(weights, starts, group["lr"] * self.rate)
