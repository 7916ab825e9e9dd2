"""What the machine has, asked of the driver: this runs before PyTorch is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_GIB = 8
"""Weights, gradients and optimizer of the released model take 6.8 GB in float32."""
FIRST_FP16, FIRST_BF16 = (7, 0), (8, 0)
"""Compute capabilities from which a card is quick in that precision: Volta and Turing (T4), then Ampere."""
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """A card."""

    name: str
    memory_gib: float
    capability: tuple[int, int]
    """As (7, 5); what the card can do follows from it."""


def find_gpus() -> list[Gpu]:
    """The cards the driver lists, as far as `CUDA_VISIBLE_DEVICES` lets them be used; none without a driver."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = parse_gpus(done.stdout) if done.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    numbers = [int(one) for one in visible.split(",") if one.strip().isdigit()]
    return [gpus[number] for number in numbers if number < len(gpus)]


def parse_gpus(text: str) -> list[Gpu]:
    """Lines such as `Tesla T4, 15360, 7.5`, memory in MiB."""
    gpus = []
    for line in text.strip().splitlines():
        name, memory, capability = (field.strip() for field in line.rsplit(",", 2))
        major, _, minor = capability.partition(".")
        gpus.append(Gpu(name, float(memory) / 1024, (int(major), int(minor or 0))))
    return gpus


def choose_precision(gpus: Sequence[Gpu]) -> str:
    """The quickest precision that all cards have: bf16, fp16, or no for none."""
    if not gpus:
        return "no"
    weakest = min(gpu.capability for gpu in gpus)
    return "bf16" if weakest >= FIRST_BF16 else "fp16" if weakest >= FIRST_FP16 else "no"


def describe(gpus: Sequence[Gpu], free_disk_bytes: int) -> list[str]:
    """What is there and what it can do, with a warning where that isn't enough."""
    lines = [f"{gpu.name}: {gpu.memory_gib:.0f} GiB of memory" for gpu in gpus]
    precision = choose_precision(gpus)
    if gpus:
        quick = {"no": "It computes in float32.", "fp16": "It is quick in fp16.", "bf16": "It is quick in bf16."}
        lines.append(f"{quick[precision]} Training will use {precision if precision != 'no' else 'float32'}.")
    lines.append(f"{free_disk_bytes / 1e9:.0f} GB of disk are free.")
    if not gpus:
        lines.append(
            "Warning: there is no GPU. The demo runs; a real voice would take days. In Colab: Runtime, Change runtime "
            "type, T4 GPU. On Kaggle: Settings, Accelerator, GPU."
        )
    elif min(gpu.memory_gib for gpu in gpus) < LEAST_GIB - 0.5:  # cards report a little less than they are sold with
        lines.append(
            f"Warning: training all of TorToiSe's weights takes {LEAST_GIB} GiB or more, so this card will run out of "
            "memory. An adapter takes less: Data_Settings lora.rank: 16, and 1e-4 as TrainingRate."
        )
    return lines


def show_machine() -> None:
    """Print what the machine has."""
    print("\n".join(describe(find_gpus(), shutil.disk_usage(".").free)))
