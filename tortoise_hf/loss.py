"""Next-token cross-entropy of the two heads, as sums and counts.

Sums instead of means, because the mean belongs to the whole optimizer step: all micro-batches of all processes. Only
then do 1×8, 2×4 accumulated and 2 processes × 4 clips give the same gradient when clips differ in length.
"""

# B batch · T text tokens · C mel codes · V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tortoise_hf.data.collate import IGNORE_INDEX


@dataclass
class LossSums:
    """Cross-entropy summed over targets, in nats, with the number of targets; scalars on the model's device."""

    text: torch.Tensor
    mel: torch.Tensor
    num_text: torch.Tensor
    num_mel: torch.Tensor

    def counts(self) -> torch.Tensor:
        """(2,) float64: text and mel targets."""
        return torch.stack([self.num_text, self.num_mel]).to(torch.float64)

    def values(self) -> torch.Tensor:
        """(4,) float64, detached: text sum, mel sum, text targets, mel targets; ready to be summed over processes."""
        return torch.cat([torch.stack([self.text, self.mel]).detach().to(torch.float64), self.counts()])


def gpt_loss(
    text_logits: torch.Tensor, mel_logits: torch.Tensor, text_targets: torch.Tensor, mel_targets: torch.Tensor
) -> LossSums:
    """Cross-entropy sums of both heads.

    Args:
        text_logits: (B, T, V_text) before softmax.
        mel_logits: (B, C, V_mel) likewise.
        text_targets: (B, T) ids, `IGNORE_INDEX` where nothing is asked.
        mel_targets: (B, C) likewise.

    Returns:
        Sums in nats and target counts. Computed in float32 whatever the logits' type.
    """
    return LossSums(
        text=_sum_cross_entropy(text_logits, text_targets),
        mel=_sum_cross_entropy(mel_logits, mel_targets),
        num_text=(text_targets != IGNORE_INDEX).sum(),
        num_mel=(mel_targets != IGNORE_INDEX).sum(),
    )


def _sum_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


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
