"""What a checkpoint keeps of AdamW's memory: all of it, 8 bits of each value, or nothing.

AdamW remembers two float32 numbers per weight, so a full checkpoint is three times the model. The 8-bit form is our own
few lines: bitsandbytes (`optim.optimizer: adamw_8bit`) shrinks the optimizer in memory, with a dependency of its own,
while this is about the file alone. What bitsandbytes keeps is written as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

OptimizerState = Literal["full", "8bit", "none"]

BLOCK = 256
"""Values that share a scale."""
MIN_VALUES = 4096
"""Tensors with fewer values are kept in full: they weigh nothing, and norms and biases react to small errors."""
WEIGHT_BYTES = 4
"""Bytes of one weight in a checkpoint."""
STATE_BYTES: dict[str, float] = {"full": 8.0, "8bit": 2 * (1 + 4 / BLOCK), "none": 0.0}
"""Bytes of one weight's optimizer state, for the two moments together."""
MOMENT_BYTES: dict[str, float] = {"adamw": STATE_BYTES["full"], "adamw_8bit": STATE_BYTES["8bit"]}
"""The same in memory, by `optim.optimizer`. Source: bitsandbytes' blocks of 256 values with a float32 scale each; what
it keeps in full (tensors below 4096 values) weighs nothing."""


def pack(state_dict: dict[str, Any], kind: OptimizerState) -> dict[str, Any]:
    """The state as it is written; `unpack` undoes it.

    Args:
        state_dict: of AdamW, with full (not sharded) tensors.
        kind: how much of it to keep.
    """
    if kind == "full":
        return state_dict
    if kind == "none":
        return {**state_dict, "state": {}}
    return {**state_dict, "state": {key: _pack_values(values) for key, values in state_dict["state"].items()}}


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """The state as AdamW takes it, whatever kind was written."""
    states = {
        key: {name: _dequantise(value) if _is_packed(value) else value for name, value in values.items()}
        for key, values in packed["state"].items()
    }
    return {**packed, "state": states}


def optimizer_of(param_groups: list[dict[str, Any]]) -> str:
    """The `optim.optimizer` that made parameter groups: torch's AdamW has a setting that bitsandbytes' lacks."""
    return "adamw" if "amsgrad" in param_groups[0] else "adamw_8bit"


def _is_packed(value: Any) -> bool:
    return isinstance(value, dict) and "codes" in value


def _pack_values(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: quantise(value, signed=name == "exp_avg") if name in ("exp_avg", "exp_avg_sq") else value
        for name, value in values.items()
    }


def quantise(tensor: torch.Tensor, signed: bool) -> torch.Tensor | dict[str, Any]:
    """8 bits per value and a scale per block of 256, or the tensor itself if it is small.

    The codes are not spread evenly but by roots, since moments range over many powers of ten: the square root for the
    mean gradient (steps near 0 of 1/16 000 of the largest), the fourth root for the squared one (1/4 000 000 000).
    Squares are rounded up and never to 0, so rounding can only make a step of AdamW smaller, not blow it up.

    Args:
        tensor: float values of any shape.
        signed: whether values may be negative.
    """
    if tensor.numel() < MIN_VALUES:
        return tensor
    flat = tensor.detach().float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(dim=1, keepdim=True)
    share = padded.abs() / scales.clamp(min=torch.finfo(torch.float32).tiny)
    signed_codes = (share.sqrt() * 127).round() * padded.sign() + 128
    codes = signed_codes if signed else (share.sqrt().sqrt() * 255).ceil()
    return {
        "codes": codes.to(torch.uint8).flatten()[: len(flat)].clone(),
        "scales": scales.flatten().clone(),
        "shape": list(tensor.shape),
        "signed": signed,
    }


def _dequantise(packed: dict[str, Any]) -> torch.Tensor:
    codes = packed["codes"].float()
    scales = packed["scales"].repeat_interleave(BLOCK)[: len(codes)]
    if packed["signed"]:
        share = (codes - 128) / 127
        values = share.abs().square() * share.sign()
    else:
        values = (codes / 255).square().square()
    return (values * scales).view(packed["shape"])


def checkpoint_bytes(num_weights: int, kind: OptimizerState, optimizer: str = "adamw") -> int:
    """Bytes of a checkpoint with `num_weights` trained weights, to within a percent.

    Args:
        num_weights: of the model, or of an adapter.
        kind: what is kept of the optimizer.
        optimizer: which one it is.
    """
    return round(num_weights * (WEIGHT_BYTES + min(STATE_BYTES[kind], MOMENT_BYTES[optimizer])))
