"""What several processes must do together: agree, bring gradients together, gather and deal out sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor, distribute_tensor

from tortoise_hf.errors import UserError

BUCKET_ELEMENTS = 1 << 24
"""Gradient values summed over processes in one message: 64 MiB of float32, so that starting it costs nothing."""


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of every weight (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on at least one process; every process calls it and gets the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def raise_together(accelerator: Accelerator, message: str | None) -> None:
    """End every process with the same sentence if one of them has something to say; also a barrier.

    Raises:
        UserError: the first message found.
    """
    found = [one for one in gather_object([message]) if one is not None]
    if found:
        raise UserError(found[0])


def average_gradients(parameters: Iterable[torch.nn.Parameter], num_processes: int) -> None:
    """Replace gradients by their mean over processes, in few large messages. Summed in a fixed order."""
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
        if size >= BUCKET_ELEMENTS:
            _average(bucket, num_processes)
            bucket, size = [], 0
    if bucket:
        _average(bucket, num_processes)


def _average(gradients: list[torch.Tensor], num_processes: int) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(num_processes)
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def to_full(tensor: Any) -> Any:
    """A sharded tensor put together on every process; anything else as it is. Every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all processes hold, dealt out the way `like` is.

    Args:
        tensor: full values.
        like: a parameter; if it isn't sharded, `tensor` comes back as it is.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    # Everybody has read the same file, so nothing needs to be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
