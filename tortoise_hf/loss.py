"""Next-token cross-entropy of the two heads over a micro-batch, as sums and counts.

Sums instead of means, because the mean belongs to the whole optimizer step: all micro-batches of all processes. Only
then do 1×8, 2×4 accumulated and 2 processes × 4 clips give the same gradient when clips differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tortoise_hf.data.collate import Batch


@dataclass
class LossSums:
    """Cross-entropy summed over targets, in nats, with the number of targets."""

    text: torch.Tensor
    """Float64 scalar on the model's device."""
    mel: torch.Tensor
    num_text: int
    num_mel: int

    def counts(self) -> torch.Tensor:
        """(2,) float64 on the device: text and mel targets."""
        # Filled in there: a copy from the host would be waited for.
        return torch.stack([self.text.new_full((), number) for number in (self.num_text, self.num_mel)])

    def values(self) -> torch.Tensor:
        """(4,) float64, detached: text sum, mel sum, text targets, mel targets; ready to be summed over processes."""
        return torch.cat([torch.stack([self.text, self.mel]).detach(), self.counts()])


def gpt_loss(model: torch.nn.Module, batch: Batch) -> LossSums:
    """Forward pass over a micro-batch, and what it costs.

    Args:
        model: a `TortoiseGPT`, wrapped or not.
        batch: on its device.
    """
    losses = model(**batch.model_inputs())
    return LossSums(losses.text, losses.mel, batch.num_text_targets, batch.num_mel_targets)


def weighted_mean(sums: LossSums, counts: torch.Tensor, text_weight: float, mel_weight: float) -> torch.Tensor:
    """Weighted sum of both losses, each divided by a number of targets.

    Args:
        sums: of one micro-batch.
        counts: (2,) text and mel targets to divide by: of the whole optimizer step, or of this micro-batch alone.
        text_weight: share of the text head.
        mel_weight: share of the mel head.

    Returns:
        Scalar in nats per token; 0 for a head without targets.
    """
    counts = counts.clamp(min=1).to(sums.mel.dtype)
    return text_weight * sums.text / counts[0] + mel_weight * sums.mel / counts[1]


def weighted_mean_of_values(values: torch.Tensor, text_weight: float, mel_weight: float) -> tuple[float, float, float]:
    """Losses out of summed `LossSums.values()`, for logs and evaluation.

    Args:
        values: (4,) text sum, mel sum, text targets, mel targets, on the CPU.
        text_weight: share of the text head.
        mel_weight: share of the mel head.

    Returns:
        Text loss, mel loss and their weighted sum, in nats per token.
    """
    text_sum, mel_sum, num_text, num_mel = values.tolist()
    text_loss, mel_loss = text_sum / max(1, num_text), mel_sum / max(1, num_mel)
    return text_loss, mel_loss, text_weight * text_loss + mel_weight * mel_loss
