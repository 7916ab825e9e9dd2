"""What every benchmark needs: taking turns, time and memory, what the machine is and can do, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class Cost:
    """What one turn took."""

    seconds: float
    cpu_seconds: float
    """Processor time of this process, all its threads together."""
    peak_bytes: int
    """Most memory in use at once: of the GPU where there is one, else of the process."""


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(
    operation: Callable[[], object],
    device: torch.device,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of the quickest of several times, by a clock."""
    times = []
    for _ in range(repeats):
        started = clock()
        operation()
        wait_for(device)
        times.append(clock() - started)
    return min(times)


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations per second the device reaches with large square matrices, as precisely as it is set to multiply."""
    width = 8192 if device.type == "cuda" else 2048
    square = torch.randn(width, width, device=device, dtype=dtype)
    square @ square  # a device is slower the first time
    wait_for(device)
    return 2 * width**3 / best_seconds(lambda: square @ square, device, clock=clock)


def reset_peak(device: torch.device) -> None:
    """Forget the most memory that was in use so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux; elsewhere the peak is that of the process since its start: too much rather than too little.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory in use at once since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def measured(turn: Callable[[], object], device: torch.device) -> Cost:
    """Do something once."""
    reset_peak(device)
    wait_for(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    turn()
    wait_for(device)
    return Cost(time.perf_counter() - started, time.process_time() - cpu_started, peak_bytes(device))


def alternate(
    variants: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[Cost]]:
    """Let variants take turns, so that a machine that gets slower gets slower for all of them.

    Args:
        variants: what each does in its turn.
        repeats: turns of each that are measured.
        device: that does the work.
        warm_up: turns of each that come before and aren't measured.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for turn in range(-warm_up, repeats):
        for name, work in variants.items():
            cost = measured(work, device)
            print(f"turn {turn + 1} of {repeats}, {name}: {cost.seconds:.2f} s", file=sys.stderr, flush=True)
            if turn >= 0:
                costs[name].append(cost)
    return costs


def medians(costs: list[Cost]) -> Cost:
    """Median time of several turns, and the most memory that one of them took."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.cpu_seconds for cost in costs),
        max(cost.peak_bytes for cost in costs),
    )


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict:
    """When, on what hardware and with which programs something was measured; no names of machines or people."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def table(rows: list[dict[str, object]]) -> str:
    """Rows as Markdown tables, one for each set of keys."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=list)]
    return "\n\n".join(map(_one_table, groups))


def _one_table(rows: list[dict[str, object]]) -> str:

    def text(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else (
            f"{value:,.0f}" if isinstance(value, float) else str(value))  # fmt: skip

    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([text(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--json`."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")


def finish(args: argparse.Namespace, name: str, device: torch.device, rows: list[dict], **more: object) -> dict:
    """Print a benchmark's table and write its JSON.

    Returns: what was written: name, settings, environment and rows, and whatever else is given.
    """
    settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
    result = {"name": name, "settings": settings, "environment": environment(device), "rows": rows, **more}
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
