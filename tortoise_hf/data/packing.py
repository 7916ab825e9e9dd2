"""Rows of unequal length one behind the other instead of padded side by side, and where everything is in them.

A packed micro-batch is one long row: ``[conditioning][text][mel]`` of its first row, the same of the second, and so on,
of real positions alone. Ids stay padded, for they are small; what is as wide as the model never is.
"""

# B rows · T text positions · C mel positions · N real positions of all rows · L positions of the longest row

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch

IGNORE_INDEX = -100
"""Target of positions that count for nothing; PyTorch's default for cross-entropy."""


@dataclass  # not frozen: torch.compile would look into it and compile anew for every micro-batch
class Packing:
    """Where the positions of a micro-batch are. All tensors are int64 indices but `boundaries`."""

    row_lengths: tuple[int, ...]
    """B positions of each row; known without asking the device, which would have to be waited for."""
    boundaries: torch.Tensor
    """(B + 1,) int32 where each row begins in the packed row, and N."""
    text: torch.Tensor
    """Real text positions, in the flattened (B, T) ids."""
    mel: torch.Tensor
    """Real mel positions, in the flattened (B, C) ids."""
    order: torch.Tensor
    """(N,) of each packed position: its place behind B conditionings, then all of `text`, then all of `mel`."""
    text_targets: torch.Tensor
    """Text targets that count, in the flattened (B, T) targets."""
    mel_targets: torch.Tensor
    """Mel targets that count, in the flattened (B, C) targets."""
    text_askers: torch.Tensor
    """Packed positions that predict `text_targets`."""
    mel_askers: torch.Tensor
    """Packed positions that predict `mel_targets`."""
    spread: torch.Tensor
    """(B · L,) packed position of each place of padded rows; at padding, any."""
    gathered: torch.Tensor
    """(N,) the reverse: the place in flattened (B, L) rows of each packed position."""

    @property
    def num_positions(self) -> int:
        """N."""
        return sum(self.row_lengths)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Length and number of neighbouring rows that are equally long."""
        return [(length, len(list(rows))) for length, rows in groupby(self.row_lengths)]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Packing:
        """The same with other tensors, such as copies on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Packing(**{name: function(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()})


def pack(
    text_lengths: torch.Tensor, mel_lengths: torch.Tensor, text_targets: torch.Tensor, mel_targets: torch.Tensor
) -> Packing:
    """Work out where everything goes; all tensors are on the CPU.

    Args:
        text_lengths: (B,) real positions of each text row.
        mel_lengths: (B,) real positions of each mel row.
        text_targets: (B, T) ids, `IGNORE_INDEX` where nothing is asked.
        mel_targets: (B, C) likewise.
    """
    lengths = 1 + text_lengths + mel_lengths
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    starts = boundaries[:-1, None]
    text_offsets, mel_offsets = torch.arange(text_targets.shape[1]), torch.arange(mel_targets.shape[1])
    text_places, mel_places = starts + 1 + text_offsets, starts + 1 + text_lengths[:, None] + mel_offsets
    is_text, is_mel = text_offsets < text_lengths[:, None], mel_offsets < mel_lengths[:, None]
    asks_text, asks_mel = text_targets != IGNORE_INDEX, mel_targets != IGNORE_INDEX
    assert not (asks_text & ~is_text).any(), "a text target lies behind its row"
    assert not (asks_mel & ~is_mel).any(), "a mel target lies behind its row"
    offsets = torch.arange(int(lengths.max()))
    return Packing(
        row_lengths=tuple(lengths.tolist()),
        boundaries=boundaries.to(torch.int32),
        text=_indices(is_text),
        mel=_indices(is_mel),
        order=torch.cat([boundaries[:-1], text_places[is_text], mel_places[is_mel]]).argsort(),
        text_targets=_indices(asks_text),
        mel_targets=_indices(asks_mel),
        text_askers=text_places[asks_text],
        mel_askers=mel_places[asks_mel],
        spread=(starts + offsets).clamp(max=int(boundaries[-1]) - 1).flatten(),
        gathered=_indices(offsets < lengths[:, None]),
    )


def _indices(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)
