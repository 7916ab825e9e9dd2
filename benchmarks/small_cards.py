"""What the small cards' recipes take of a GPU's memory, measured on clips of the greatest length they let through.

    python benchmarks/small_cards.py
    python benchmarks/small_cards.py --recipes t4 --size tiny --device cpu

Model, adapter and optimizer are made as scripts/train.py makes them, with random weights; micro-batches have the
recipe's size. Two steps of a few micro-batches are done, the second with the optimizer's memory in place; more
micro-batches add nothing, as gradients lie there from the first on. Beside the peak stands what scripts/memory.py
computes.

On a GPU PyTorch is given no more memory than such a card has to spare (`limit_gib`), so that nothing is kept for later
that a small card would give back. A recipe that doesn't fit says so in its line.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from measuring import add_common_arguments, finish, peak_bytes, reset_peak, wait_for
from sizes import SIZES

from tortoise_hf.cli import load_config
from tortoise_hf.config import Config
from tortoise_hf.faults import StepOutOfMemory
from tortoise_hf.lora import widen
from tortoise_hf.machine import set_gradient_checkpointing
from tortoise_hf.memory import longest_batch, step_memory
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.optim import build_optimizer, settle_optimizer
from tortoise_hf.step import optimizer_step

RECIPES = {"t4": ("fp16", 14.0), "8gb": ("bf16", 7.5), "lora": ("fp16", 7.0)}
"""Of configs/: mixed precision, and GiB that such a card has to spare besides what CUDA and a desktop take."""
_CONFIGS = Path(__file__).parents[1] / "configs"
_GIB = 2**30


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """A recipe's line of the table, in GiB of 2^30 bytes."""
    precision, limit = RECIPES[name]
    device, sizes = torch.device(args.device), SIZES[args.size][0]
    AcceleratorState._reset_state(reset_partial_state=True)  # of the recipe before, which had another precision
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as in a run
    cfg = settle_optimizer(load_config(["--config", str(_CONFIGS / f"{name}.yaml")], ""), accelerator)
    settings = cfg.training.micro_batch_size, cfg.model.gradient_checkpointing
    reset_peak(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * _GIB / total), device)
    row: dict[str, object] = {"recipe": name, "mixed_precision": precision, "optimizer": cfg.optim.optimizer}
    try:
        row |= take_steps(cfg, accelerator, args)
        row["fits"] = True
    except (StepOutOfMemory, torch.cuda.OutOfMemoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        row["fits"] = False
    row["peak_gib"] = peak_bytes(device) / _GIB
    if device.type == "cuda":
        row |= {"reserved_gib": torch.cuda.max_memory_reserved(device) / _GIB, "limit_gib": limit}
    row["computed_gib"] = step_memory(cfg, sizes, precision, *settings).total / _GIB
    return row


def take_steps(cfg: Config, accelerator: Accelerator, args: argparse.Namespace) -> dict[str, object]:
    """Two optimizer steps, as a run makes them; what they were made of."""
    device, sizes = torch.device(args.device), SIZES[args.size][0]
    torch.manual_seed(cfg.training.seed)
    model = TortoiseGPT(sizes).train()
    if cfg.lora.rank > 0:
        widen(model, cfg.lora)
    set_gradient_checkpointing(model, cfg.model.gradient_checkpointing)
    model.to(device)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, cfg.optim))
    for _ in range(2):
        batches = [longest_batch(cfg, sizes, cfg.training.micro_batch_size) for _ in range(args.micro_batches)]
        optimizer_step(cfg, accelerator, model, optimizer, batches)
        optimizer.zero_grad()
    wait_for(device)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return {
        "trained": trained,
        "clips_at_once": len(batches[0].indices),
        "positions": batches[0].packing.row_lengths[0],
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--size", choices=SIZES, default="released")
    parser.add_argument("--micro_batches", type=int, default=2, help="of a step")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    rows = []
    for name in args.recipes:
        started = time.perf_counter()
        rows.append(measure(name, args))
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return finish(args, "small_cards", torch.device(args.device), rows)


if __name__ == "__main__":
    main()
