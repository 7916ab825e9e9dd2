"""What a training step takes of a GPU's memory, computed where there is no GPU.

The model's own forward pass runs on tensors that have a shape and a device but no contents, and what it leaves for the
backward pass is counted. Nothing is measured: what a real card shows on top is CUDA's own (some hundred MiB) and what
its allocator can't use. The plan of a run (`plan.py`) goes by a measurement instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import initialization

from tortoise_hf.audio import HOP_LENGTH, SAMPLE_RATE, SAMPLES_PER_CODE
from tortoise_hf.config import Config
from tortoise_hf.data.collate import Batch, Collator, Example
from tortoise_hf.errors import UserError
from tortoise_hf.lora import widen
from tortoise_hf.loss import gpt_loss
from tortoise_hf.machine import set_gradient_checkpointing
from tortoise_hf.models.cross_entropy import largest_piece
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.pretrained import RELEASED_BASE
from tortoise_hf.optimizer_state import MOMENT_BYTES
from tortoise_hf.units import format_bytes

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_DEVICE = "cuda"
_LOGIT_GRADIENTS = 2
"""Float32 copies of the last piece of mel logits that the backward pass begins with: the gradient behind the softmax
and before."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes in use at the height of a training step, by what for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass leaves, half-precision copies of weights included, and what the backward pass adds."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(
    cfg: Config, sizes: GPTConfig, mixed_precision: str, micro_batch_size: int, gradient_checkpointing: bool
) -> StepMemory:
    """Memory of a step on clips of the greatest length that the settings let through.

    Args:
        cfg: `data`, `lora` and `optim.optimizer` are read.
        sizes: of the GPT.
        mixed_precision: no, fp16 or bf16.
        micro_batch_size: clips at once.
        gradient_checkpointing: whether activations are recomputed.
    """
    batch = longest_batch(cfg, sizes, micro_batch_size)
    with torch.device("meta"), initialization.no_init_weights():
        model = TortoiseGPT(sizes)
    if cfg.lora.rank > 0:
        widen(model, cfg.lora)
    set_gradient_checkpointing(model.train(), gradient_checkpointing)
    with FakeTensorMode(), _Kernels(), _Tally() as tally:
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(_shape_of(value), requires_grad=value.requires_grad))
            for name, value in module.named_buffers(recurse=False):
                setattr(module, name, _shape_of(value))
        batch = batch.map(_shape_of)
        weights = _bytes(model.parameters())
        trained = [value for value in model.parameters() if value.requires_grad]
        before = tally.live
        tally.highest = before
        with _autocast(PRECISIONS[mixed_precision]):
            sums = gpt_loss(model, batch)
            growth = tally.live - before
            logits = 4 * largest_piece(batch.num_mel_targets, sizes.mel_vocabulary)
            recomputed = _largest_block(model, batch, tally) if gradient_checkpointing else 0
            activations = max(tally.highest - before, growth + max(_LOGIT_GRADIENTS * logits, recomputed))
        del sums
    return StepMemory(
        weights,
        _bytes(trained),
        round(MOMENT_BYTES[cfg.optim.optimizer] * sum(value.numel() for value in trained)),
        activations,
    )


def memory_table(cfg: Config, mixed_precision: str) -> str:
    """`step_memory` of what a config leaves open, in lines for people.

    Raises:
        UserError: if the sizes of the config's base can't be told without fetching it.
    """
    sizes, given = _sizes(cfg.model.base), cfg.training.micro_batch_size
    adapter = f"an adapter of rank {cfg.lora.rank}" if cfg.lora.rank else "all weights"
    lines = [
        f"A step of {adapter}, {cfg.optim.optimizer}, mixed precision {mixed_precision}, clips of "
        f"{cfg.data.max_samples:,} samples with {cfg.data.max_text_ids} text ids. Computed, not measured:",
        f"{'clips at once':>13}  {'recomputed':>10}  {'weights':>9}  {'gradients':>9}  {'optimizer':>9}  "
        f"{'activations':>11}  {'in all':>9}",
    ]
    for checkpointing in (False, True) if cfg.model.gradient_checkpointing is None else (
        cfg.model.gradient_checkpointing,
    ):  # fmt: skip
        for size in (1, 2, 4, 8) if given is None else (given,):
            found = step_memory(cfg, sizes, mixed_precision, size, checkpointing)
            parts = (found.weights, found.gradients, found.optimizer, found.activations, found.total)
            figures = "  ".join(
                f"{format_bytes(part):>{width}}" for part, width in zip(parts, (9, 9, 9, 11, 9), strict=True)
            )
            lines.append(f"{size:>13}  {'yes' if checkpointing else 'no':>10}  {figures}")
    return "\n".join(lines)


def _sizes(base: str) -> GPTConfig:
    config = Path(base).expanduser() / "config.json"
    if base == RELEASED_BASE or (Path(base).is_dir() and not config.is_file()):
        return GPTConfig()
    if not config.is_file():
        raise UserError(
            f"model.base {base} is no folder on this machine, so its sizes aren't known. Pull it (scripts/pull.py) and "
            "name the folder, or take --model.base released."
        )
    return GPTConfig.from_pretrained(config.parent)


def longest_batch(cfg: Config, sizes: GPTConfig, count: int) -> Batch:
    """As many clips as `count`, all of the greatest length, as the collator makes a micro-batch of them."""
    num_codes = min(cfg.data.max_samples // SAMPLES_PER_CODE + 1, sizes.max_mel_tokens)
    frames = int(cfg.data.conditioning_seconds * SAMPLE_RATE) // HOP_LENGTH + 1
    example = Example(
        text_ids=np.ones(min(cfg.data.max_text_ids, sizes.max_text_tokens), dtype=np.int64),
        mel_codes=np.zeros(num_codes, dtype=np.int64),
        conditioning_mel=np.zeros((cfg.data.num_conditioning_clips, sizes.num_mel_bins, frames), dtype=np.float32),
        index=0,
    )
    return Collator.for_model(sizes, cfg.data.padding)([example] * count)


def _largest_block(model: TortoiseGPT, batch: Batch, tally: _Tally) -> int:
    """What one block leaves for its backward pass when it is computed once more."""
    clips, width = batch.conditioning_mel.flatten(0, 1), model.config.hidden_size
    inputs = {
        model.gpt.h[0]: ((1, batch.packing.num_positions, width), {"packing": batch.packing}),
        model.conditioning_encoder.attn[0]: ((len(clips), width, clips.shape[-1]), {}),
    }
    largest = 0
    for block, (shape, options) in inputs.items():
        hidden = torch.zeros(*shape, device=_DEVICE, requires_grad=True)
        before = tally.live
        answer = block.forward(hidden, **options)
        largest = max(largest, tally.live - before)
        del answer
    return largest


def _shape_of(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=value.dtype, device=_DEVICE)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.highest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(torch.Tensor, self._count, func(*args, **(kwargs or {})))

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.highest = max(self.highest, self.live)
            weakref.finalize(storage, self._forget, key, size)
        return tensor

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Kernels(TorchFunctionMode):
    """Takes the attention kernel that every NVIDIA card in use has; without a card torch would choose none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            dropout, causal = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, True, dropout, causal)[0]
        return func(*args, **kwargs)


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision on a device that isn't there, where `torch.autocast` would switch itself off."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(_DEVICE), torch.get_autocast_dtype(_DEVICE)
    torch.set_autocast_enabled(_DEVICE, True)
    torch.set_autocast_dtype(_DEVICE, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(_DEVICE, before[0])
        torch.set_autocast_dtype(_DEVICE, before[1])
