"""The encoder that turns reference clips into the vector telling the GPT who speaks.

A clip shorter than the window has silence behind it, and every silent frame is the same as every other: nothing in this
encoder knows where a frame stands. So on a CPU the silence behind a clip is computed as one frame that counts as often
as it stands there, in attention and in the norms, and clips of unequal length lie one behind the other. The vector is
the same, to within rounding. On a GPU clips stay side by side in windows of one length; this hasn't been tried there.
"""

# N clips · F mel frames · S frames of all clips, one behind the other · D hidden size

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class ClipRow:
    """Clips one behind the other, each without the frames that repeat its last one."""

    lengths: list[int]
    """Frames kept of each of the N clips."""
    repeats: list[int]
    """How often the last of them counts."""
    owners: torch.Tensor
    """(S,) int64 the clip that each frame is of."""
    counts: torch.Tensor
    """(S,) float32 times each frame counts."""
    num_frames: int
    """F."""

    @classmethod
    def find(cls, mel: torch.Tensor) -> ClipRow | None:
        """Look for repeated frames at the ends of clips.

        Args:
            mel: (N, bins, F).

        Returns: None if no clip ends in any.
        """
        # A frame that isn't a number equals not even itself.
        repeats = (mel == mel[..., -1:]).all(1).flip(1).to(torch.int64).cumprod(1).sum(1).clamp(min=1)
        if int(repeats.max()) == 1:
            return None
        lengths = mel.shape[-1] + 1 - repeats
        counts = torch.ones(int(lengths.sum()))
        counts[lengths.cumsum(0) - 1] = repeats.float()
        owners = torch.arange(len(mel)).repeat_interleave(lengths)
        return cls(lengths.tolist(), repeats.tolist(), owners, counts, mel.shape[-1])

    def of(self, mel: torch.Tensor) -> torch.Tensor:
        """The row made of the clips it was found in: (N, bins, F) to (1, bins, S)."""
        return torch.cat([clip[:, :length] for clip, length in zip(mel, self.lengths, strict=True)], dim=1).unsqueeze(0)

    def split(self, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What belongs to each clip of a tensor with S frames in its third dimension."""
        return row.split(self.lengths, dim=2)

    def mean(self, row: torch.Tensor) -> torch.Tensor:
        """Mean over the frames of each clip, given to each of its frames: (groups, S) to the same."""
        each = torch.zeros(len(row), len(self.lengths)).index_add(1, self.owners, row * self.counts)
        return (each / self.num_frames).index_select(1, self.owners)


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 whatever the precision of its input and weights."""

    def forward(self, hidden: torch.Tensor, row: ClipRow | None = None) -> torch.Tensor:
        """Return the normalised hidden states, in the input's precision; with `row`, (1, D, S) of its clips."""
        if row is not None:
            normed = self._of_row(hidden[0].float(), row).unsqueeze(0)
        else:
            normed = F.group_norm(hidden.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(hidden.dtype)

    def _of_row(self, hidden: torch.Tensor, row: ClipRow) -> torch.Tensor:
        groups = hidden.unflatten(0, (self.num_groups, -1))
        centred = groups - row.mean(groups.mean(1)).unsqueeze(1)
        variance = row.mean(centred.square().mean(1))
        normed = (centred * (variance + self.eps).rsqrt().unsqueeze(1)).flatten(0, 1)
        return normed * self.weight.float().unsqueeze(1) + self.bias.float().unsqueeze(1)


def num_norm_groups(channels: int) -> int:
    """Groups TorToiSe uses for so many channels: 32, fewer for narrow layers, halved until they divide."""
    groups = 8 if channels <= 16 else 16 if channels <= 64 else 32
    while channels % groups:
        groups //= 2
    return groups


class FrameAttention(GradientCheckpointingLayer):
    """The layers of TorToiSe's full self-attention over frames, here and in the diffusion decoder."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(num_norm_groups(channels), channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def heads(self, hidden: torch.Tensor, row: ClipRow | None = None) -> tuple[torch.Tensor, ...]:
        """Query, key and value of hidden states, which are normed first.

        Args:
            hidden: (N, D, F), or (1, D, S) with `row`.
            row: of the clips.

        Returns: three of (N, heads, F, D / heads), or (1, heads, S, D / heads).
        """
        # The channels are split into heads first and into query, key, value inside each head.
        split = self.qkv(self.norm(hidden, row)).unflatten(1, (self.num_heads, 3, -1))
        return split.transpose(3, 4).unbind(2)

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """What is added to the hidden states: (N, heads, F, D / heads) to (N, D, F)."""
        return self.proj_out(attended.transpose(2, 3).flatten(1, 2))


class ConditioningAttention(FrameAttention):
    """Full self-attention over the frames of a conditioning clip; (N, D, F) to the same."""

    def forward(self, hidden: torch.Tensor, num_answers: int | None = None, row: ClipRow | None = None) -> torch.Tensor:
        """Return ``hidden + attention``: the residual is the input as it came, not its normalised form.

        Args:
            hidden: (N, D, F), or (1, D, S) with `row`.
            num_answers: frames of each clip that are answered for, the first ones; None: all.
            row: of the clips.

        Returns: as `hidden`, or (N, D, num_answers).
        """
        query, key, value = self.heads(hidden, row)
        if row is None:
            residual, attended = hidden[:, :, :num_answers], _attend(query[:, :, :num_answers], key, value)
        else:
            clips = zip(*(row.split(part) for part in (hidden, query, key, value)), row.repeats, strict=True)
            parts = [
                (clip[:, :, :num_answers], _attend(asks[:, :, :num_answers], *rest)) for clip, asks, *rest in clips
            ]
            # Equally many answers of each clip stand side by side; else they stay one behind the other.
            dim = 2 if num_answers is None else 0
            residual, attended = (torch.cat(part, dim) for part in zip(*parts, strict=True))
        return residual + self.project(attended)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    """Attention within clips, the last frame of which counts `repeats` times; all are (N, H, frames, E)."""
    mask = None
    if repeats > 1:  # before the softmax, log n more is n times as much
        mask = query.new_zeros(1, 1, 1, key.shape[2])
        mask[..., -1] = math.log(repeats)
    # Its kernels take the softmax in float32; the default scale equals TorToiSe's head ** -0.25 on both sides.
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class ConditioningEncoder(nn.Module):
    """Mel spectrogram of one clip to the vector that tells the GPT who speaks: (N, bins, F) to (N, D)."""

    def __init__(self, num_mel_bins: int, hidden_size: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.init = nn.Conv1d(num_mel_bins, hidden_size, 1)
        self.attn = nn.Sequential(*(ConditioningAttention(hidden_size, num_heads) for _ in range(num_layers)))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Return the state of the first frame, which has attended to all others."""
        row = ClipRow.find(mel) if self._may_shorten(mel) else None
        *blocks, last = self.attn
        hidden = self.init(mel if row is None else row.of(mel))
        for block in blocks:
            hidden = block(hidden, row=row)
        return last(hidden, num_answers=1, row=row)[:, :, 0]

    def _may_shorten(self, mel: torch.Tensor) -> bool:
        """Whether a silent frame can stand for several with the same result, and it pays."""
        # In half precision log n is too coarse; a compiled encoder would be compiled anew for every length.
        exact = mel.device.type == "cpu" and mel.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        # An adapter's dropout is drawn for each frame.
        draws = self.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.modules())
        return exact and not draws and not torch.compiler.is_compiling()
