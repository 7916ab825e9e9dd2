"""Causal attention within each row of a packed micro-batch, as an implementation that transformers' GPT-2 takes.

On a CPU, rows of equal length are computed together and no padding anywhere. On a GPU that would be a few small kernels
per row and layer; so there queries, keys and values are laid out as padded rows for the attention alone, unless torch's
kernel for rows of unequal length will do: half precision, no attention dropout, an Ampere or newer. That and the rest
of packing have not been measured on a GPU yet.
"""

# B rows · L positions of the longest · N positions of all rows · H heads · E size of a head

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tortoise_hf.data.packing import Packing
from tortoise_hf.models.dropout import dropout as drop

PACKED_SDPA = "packed_sdpa"
"""Name of the implementation. transformers makes no mask for one it doesn't know, and none is needed."""


@torch.compiler.disable  # lengths differ in every micro-batch: it would be compiled anew for each
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend; without `packing` as transformers' "sdpa" does.

    Args:
        module: asked for nothing but what "sdpa" asks.
        query: (1, H, N, E).
        key: likewise.
        value: likewise.
        attention_mask: None where rows are packed.
        dropout: of attention weights.
        scaling: of the products.
        packing: rows of the packed micro-batch.
        kwargs: whatever transformers gives besides.

    Returns: (1, N, H, E), and None in place of the weights.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    heads, options = (query, key, value), {"dropout_p": dropout, "is_causal": True, "scale": scaling}
    runs = packing.runs
    if len(runs) == 1 or not _on_gpu(query):
        attended = _by_runs(heads, runs, options)
    elif _has_kernel(query, dropout):
        rows = (packing.boundaries, packing.boundaries, max(packing.row_lengths), max(packing.row_lengths))
        attended = varlen_attn(*(part[0].transpose(0, 1) for part in heads), *rows, scale=scaling, window_size=(-1, 0))
    else:
        attended = _padded(heads, packing, options)
    return attended.unsqueeze(0), None


def _by_runs(heads: tuple[torch.Tensor, ...], runs: list[tuple[int, int]], options: dict[str, Any]) -> torch.Tensor:
    """One call for each run of equally long rows; (N, H, E)."""
    # Split, whose backward pass is one concatenation; that of slices would be a tensor of all positions for each.
    sizes, attended = [length * count for length, count in runs], []
    ours = options["dropout_p"] > 0 and heads[0].dtype == torch.float32 and heads[0].device.type == "cpu"
    attend = _with_dropout if ours else F.scaled_dot_product_attention
    for (length, count), *parts in zip(runs, *(part[0].split(sizes, dim=1) for part in heads), strict=True):
        rows = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
        attended.append(attend(*rows, **options).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _with_dropout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """What torch's attention computes on a CPU when weights are dropped, with quicker draws and fewer passes.

    Args:
        query: (rows, H, L, E) float32.
        key: likewise.
        value: likewise.
        dropout_p: of the weights.
        is_causal: True, for there is no other use.
        scale: of the products; None: E ** -0.5.
    """
    assert is_causal, "rows of a packed micro-batch are causal"
    length, size = query.shape[2:]
    mask = query.new_full((length, length), float("-inf")).triu(1)
    products = torch.baddbmm(
        mask, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=size**-0.5 if scale is None else scale
    )
    weights = drop(products.softmax(-1), dropout_p)
    return torch.bmm(weights, value.flatten(0, 1)).view_as(query)


def _padded(heads: tuple[torch.Tensor, ...], packing: Packing, options: dict[str, Any]) -> torch.Tensor:
    """One call over padded rows; (N, H, E). Padding is behind everything real, where causal attention doesn't look."""
    batch = len(packing.row_lengths)
    rows = (
        part[0].transpose(0, 1).index_select(0, packing.spread).unflatten(0, (batch, -1)).transpose(1, 2)
        for part in heads
    )
    attended = F.scaled_dot_product_attention(*rows, **options)
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, packing.gathered)


def _on_gpu(query: torch.Tensor) -> bool:
    return query.is_cuda


def _has_kernel(query: torch.Tensor, dropout: float) -> bool:
    """Whether `varlen_attn` can be used; what it takes is what FlashAttention 2 does."""
    size, half = query.shape[-1], query.dtype in (torch.float16, torch.bfloat16)
    fits = half and dropout == 0 and size % 8 == 0 and size <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


AttentionInterface.register(PACKED_SDPA, packed_attention)
