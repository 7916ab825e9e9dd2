"""Cross-entropy of a head without all of its logits in memory at once."""

# n positions · D hidden size · V vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 23
"""Most logits of a head that are there at a time: 32 MiB in float32, 1,023 positions of the released mel head.

A piece of them is held up to four times while it is worked on: as the head gives them, in float32, as log-probabilities
and as gradient. That makes 128 MiB, however many clips a micro-batch has.
"""


def sum_cross_entropy(head: nn.Module, states: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Cross-entropy of a head's predictions, in pieces of at most `MAX_LOGITS` logits.

    The backward pass computes a piece's logits again; those of the last piece are kept, as it begins with them. So
    nothing is computed twice where one piece is enough.

    Args:
        head: a layer from D to V.
        states: (n, D).
        targets: (n,) ids, all of which count.
        vocabulary: V.

    Returns: sum over positions in nats. Each is computed in float32 whatever the logits' type; the sum is a float64
        scalar, so that it doesn't depend on what is summed together.
    """
    pieces = _num_pieces(len(targets), vocabulary)
    *recomputed, last = zip(states.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
    sums = [checkpoint(_sum, head, *piece, use_reentrant=False) for piece in recomputed]
    return torch.stack([*sums, _sum(head, *last)]).sum()


def largest_piece(num_targets: int, vocabulary: int) -> int:
    """Most logits that `sum_cross_entropy` has at a time."""
    return -(-num_targets // _num_pieces(num_targets, vocabulary)) * vocabulary


def _num_pieces(num_targets: int, vocabulary: int) -> int:
    return max(1, -(-num_targets // max(1, MAX_LOGITS // vocabulary)))


def _sum(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="none").sum(dtype=torch.float64)
