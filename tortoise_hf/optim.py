"""AdamW with TorToiSe's parameter groups, per-group clipping and the learning-rate schedules."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from accelerate import Accelerator
from torch import nn

from tortoise_hf.config import Config, OptimConfig
from tortoise_hf.distributed import any_process, shards_weights, to_full
from tortoise_hf.optimizer_state import MIN_VALUES

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split trained parameters into one group with weight decay and one without.

    Without: biases, everything in a norm layer, embeddings (both token tables and both position tables). With: the
    matrices of convolutions and linear layers. Names are sorted inside a group, so the optimizer state of two runs
    lines up. Source: the groups DL-Art-School trains this model with.

    Returns:
        `[decay, no_decay]` for `torch.optim`, each with its parameter names under `names`.
    """
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if not parameter.requires_grad:
                continue
            without = name.endswith("bias") or isinstance(module, (*NORM_LAYERS, nn.Embedding))
            (no_decay if without else decay)[name] = parameter
    return [
        {"params": [group[name] for name in sorted(group)], "names": sorted(group), "weight_decay": rate}
        for group, rate in ((decay, weight_decay), (no_decay, 0.0))
    ]


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, whose step is one kernel on a GPU and on a CPU.

    With `optim.optimizer` adamw_8bit it is bitsandbytes', which keeps tensors below 4096 values in full; see
    `settle_optimizer` for where there is none.
    """
    # An adapter may have no weights without decay.
    groups = [group for group in parameter_groups(model, cfg.weight_decay) if group["params"]]
    for group in groups:
        group.pop("names")
    settings = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    if cfg.optimizer == "adamw_8bit":
        return _bitsandbytes().optim.AdamW8bit(groups, **settings)
    # The kernel goes by memory order: gradients must lie as their weights do, which is so for all of the GPT's.
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, **settings, fused=True if fused else None)


def settle_optimizer(cfg: Config, accelerator: Accelerator) -> Config:
    """The settings with an optimizer that this machine has: adamw, and a line that says so, where 8 bits can't be had.

    Every process calls it, before memory is planned.
    """
    if cfg.optim.optimizer == "adamw":
        return cfg
    obstacle = _obstacle_to_8bit(accelerator)
    if any_process(accelerator, obstacle is not None):
        accelerator.print(
            f"optim.optimizer adamw_8bit can't be had ({obstacle or 'on another process'}); this run takes adamw, "
            "whose memory is 8 bytes per trained weight instead of 2."
        )
        return cfg.having({"optim.optimizer": "adamw"})
    return cfg


def _obstacle_to_8bit(accelerator: Accelerator) -> str | None:
    """Why the 8-bit optimizer doesn't work here, tried out on a few weights; None if it does."""
    if shards_weights(accelerator):
        return "processes share the weights out, which bitsandbytes doesn't know of"
    weight = nn.Parameter(torch.ones(MIN_VALUES, device=accelerator.device))
    weight.grad = torch.ones_like(weight)
    try:
        _bitsandbytes().optim.AdamW8bit([weight], lr=0.5).step()
    except ImportError:
        return "the package bitsandbytes isn't installed: pip install 'tortoise_hf[8bit]'"
    except Exception as error:  # whatever its native library raises where it has nothing for a device
        return f"bitsandbytes fails on {accelerator.device.type}: {str(error).strip().splitlines()[0]}"
    moved = float(weight.detach().mean())
    return None if abs(moved - 0.5) < 0.05 else f"bitsandbytes computes wrongly on {accelerator.device.type}"


def _bitsandbytes() -> ModuleType:
    return importlib.import_module("bitsandbytes")


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Scale the gradients of each parameter group down to an L2 norm of `max_norm`, each group by itself.

    Call it on unscaled gradients, once per optimizer step. Source: the reference trainer clips the two groups apart.

    Returns:
        (G,) norms before clipping, one per group, on the gradients' device; of the whole gradients where weights are
        sharded.
    """
    return torch.stack([_clip(group["params"], max_norm) for group in _groups(optimizer)])


def _clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    norm = to_full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _groups(optimizer: torch.optim.Optimizer) -> Iterable[dict]:
    return (group for group in optimizer.param_groups if any(p.grad is not None for p in group["params"]))


def lr_factor(step: int, cfg: OptimConfig, max_steps: int) -> float:
    """Share of the learning rate at the optimizer step that follows `step` finished ones.

    Args:
        step: finished optimizer steps, from 0.
        cfg: schedule and its settings; without a schedule the rate is constant.
        max_steps: optimizer steps of the whole run.
    """
    warmup_steps, milestones = cfg.warmup_steps or 0, cfg.milestones or ()
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if cfg.lr_schedule == "multistep":
        return cfg.gamma ** sum(step >= milestone for milestone in milestones)
    if cfg.lr_schedule == "tortoise_multistep":
        return reference_factor(step + 1, milestones, cfg.gamma)
    if cfg.lr_schedule == "inverse_sqrt":
        # The usual form: it falls with the root of the step number, from wherever warm-up ended.
        return math.sqrt(max(1, warmup_steps) / (step + 1))
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if cfg.lr_schedule == "linear":
        return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * (1 - progress)
    if cfg.lr_schedule == "cosine":
        return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def reference_factor(step: int, milestones: Sequence[int], gamma: float, start_step: int = 0) -> float:
    """Share of the learning rate at a step of the reference trainer's MultiStepLR.

    That trainer sets the schedule's counter to the step's number and then advances it, so milestone m acts at step
    m - 1; one that would act before the first step is missed, one listed twice acts twice.

    Args:
        step: the step's number; the first is `start_step` + 1.
        milestones: as in its settings file (`gen_lr_steps`).
        gamma: the factor.
        start_step: 0, or -1 where the reference trainer makes a step number 0.
    """
    return gamma ** sum(start_step + 1 <= milestone - 1 <= step for milestone in milestones)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, cfg: OptimConfig, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as a torch scheduler; `LRScheduleCallback` advances it once per optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, cfg, max_steps))
