"""Dropout that draws quickly on a CPU.

torch draws a number for every element there, a seventh of a training step of the demo; here one does for four.
On other devices this is torch's own dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_LEVELS = 1 << 16
"""Probabilities are multiples of this many parts: 0.1 becomes 0.100006, which the scale allows for."""


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop elements with probability `p` in training, and scale the others up."""
        return dropout(hidden, self.p) if self.training else hidden


def dropout(hidden: torch.Tensor, p: float) -> torch.Tensor:
    """Drop elements with probability `p`, and scale the others by 1 / (1 - p).

    Args:
        hidden: of any shape, floating point.
        p: from 0 to 1; on a CPU the nearest multiple of 2 ** -16.

    Returns: of the same shape; the draws are of torch's default generator.
    """
    dropped = round(p * _LEVELS)
    if not 0 < dropped < _LEVELS or hidden.device.type != "cpu":
        return F.dropout(hidden, p)
    bits = torch.empty((hidden.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    kept = bits[: hidden.numel()].view(hidden.shape) >= dropped - _LEVELS // 2
    return hidden * kept.to(hidden.dtype).mul_(_LEVELS / (_LEVELS - dropped))
