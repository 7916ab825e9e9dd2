"""Held-out loss: over the whole evaluation set, gathered over processes, the same whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from tortoise_hf.config import OptimConfig
from tortoise_hf.data.collate import Batch
from tortoise_hf.loss import gpt_loss, weighted_mean_of_values


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[Batch],
    cfg: OptimConfig,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss per token of all evaluation clips.

    Args:
        accelerator: gathers the sums of all processes.
        model: the unwrapped model (nothing is synchronised in its forward pass); dropout is off meanwhile.
        batches: this process's share; the shares together hold every clip once.
        cfg: weights of the two losses.
        on_batch: called after every batch.

    Returns:
        `eval_loss` (weighted sum), `eval_mel_loss`, `eval_text_loss`: nats per token, every token counting the same.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(accelerator.device)
        total += gpt_loss(model, batch).values().cpu()  # evaluation waits for the GPU anyway
        on_batch()
    model.train(was_training)
    total = accelerator.reduce(total.to(accelerator.device), reduction="sum").cpu()
    text_loss, mel_loss, loss = weighted_mean_of_values(total, cfg.text_loss_weight, cfg.mel_loss_weight)
    return {"eval_loss": loss, "eval_mel_loss": mel_loss, "eval_text_loss": text_loss}
