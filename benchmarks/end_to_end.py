"""From a folder of recordings to the end of an epoch, beside the reference: whole programs, as one starts them.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --root DATASET --base BASE --epochs 1 3 --conditioning_group 1 --num_workers 8

Every turn begins with nothing prepared: ours is scripts/train.py with a new cache, which also plans, saves a checkpoint
and exports; the reference is reference_step.py, which saves its weights. Neither evaluates. Both make steps of the same
number of clips. Loading Python's packages counts for both; `packages` is what that takes alone. Modules are compiled
before the first turn, as they are after anybody's first start.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Cost, add_common_arguments, alternate, finish, medians

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = "import accelerate, datasets, soundfile, torch, torchaudio, transformers"
MODULES = f"{PACKAGES}, reference_step, tortoise_hf.callbacks"
"""Nearly all that the programs load."""


def run(command: list[str], environment: dict[str, str]) -> float:
    """Run a program to its end.

    Returns: processor seconds it took, with the programs it started.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | environment | {"PYTHONDONTWRITEBYTECODE": ""}  # or each start would compile its modules
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Programs:
    """The commands, and the processor seconds of their turns."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Run in a folder that each turn empties."""
        self.args, self.folder = args, folder
        self.cpu_seconds: dict[str, list[float]] = {}

    def turn(self, name: str, command: list[str]) -> Callable[[], None]:
        """Run a command in an empty folder."""
        self.cpu_seconds[name] = []

        def run_once() -> None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            environment = {"TORTOISE_HF_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
            if self.args.device == "cpu":
                environment |= {"CUDA_VISIBLE_DEVICES": ""}
            self.cpu_seconds[name].append(run(command, environment))

        return run_once

    def ours(self, epochs: int, conditioning_group: int) -> list[str]:
        """scripts/train.py without evaluation; its settings else are its own."""
        args, output = self.args, self.folder / "run"
        settings = {
            "data.root": args.root,
            "data.num_workers": args.num_workers,
            "data.conditioning_group": conditioning_group,
            "model.base": args.base,
            "model.from_scratch": "true",
            "training.output_dir": output,
            "training.num_train_epochs": epochs,
            "training.batch_size": args.batch_size,
            "training.eval_strategy": "no",
            "training.save_strategy": "no",
            "samples.enabled": "false",
            "callbacks.progress": "false",
            "data.eval_fraction": 0,
            "data.min_eval_clips": 0,
        }
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return [sys.executable, str(REPOSITORY / "scripts" / "train.py"), *flags]

    def reference(self, epochs: int) -> list[str]:
        """reference_step.py."""
        args = self.args
        return [
            sys.executable, str(REPOSITORY / "benchmarks" / "reference_step.py"), "--root", str(args.root),
            "--base", str(args.base), "--epochs", str(epochs), "--batch_size", str(args.batch_size),
            "--num_workers", str(args.num_workers), "--device", args.device,
            "--output", str(self.folder / "trained.safetensors"),
        ]  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=REPOSITORY / "examples" / "demo_voice")
    parser.add_argument("--base", type=Path, default=REPOSITORY / "examples" / "demo_base")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--conditioning_group", type=int, nargs="+", default=[1, 8], help="data.conditioning_group")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.root / "metadata.csv").is_file():
        parser.error(f"--root: {args.root} holds no metadata.csv; give a folder in LJSpeech's layout.")
    if not (args.base / "config.json").is_file():
        parser.error(
            f"--base: {args.base} holds no config.json; give the folder of a base, such as examples/demo_base."
        )
    device = torch.device("cpu")  # this process itself computes nothing
    with tempfile.TemporaryDirectory(prefix="tortoise_hf_end_to_end_") as folder:
        programs = Programs(args, Path(folder) / "turn")
        variants = {"packages": programs.turn("packages", [sys.executable, "-c", PACKAGES])}
        beside: dict[str, str] = {}
        for epochs in args.epochs:
            length = f"{epochs} epoch{'s' * (epochs > 1)}"
            reference = f"reference, {length}"
            variants[reference] = programs.turn(reference, programs.reference(epochs))
            for group in args.conditioning_group:
                name = f"ours, {length}" + (f", conditioning shared by {group}" if group > 1 else "")
                variants[name] = programs.turn(name, programs.ours(epochs, group))
                beside[name] = reference
        run(
            [sys.executable, "-c", MODULES],
            {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH", "")])},
        )
        costs = alternate(variants, args.repeats, device, warm_up=0)
    found: dict[str, Cost] = {}
    for name, each in costs.items():
        turns = zip(each, programs.cpu_seconds[name], strict=True)
        found[name] = medians([Cost(cost.seconds, cpu_seconds, 0) for cost, cpu_seconds in turns])
    rows = []
    for name, cost in found.items():
        reference = found[beside.get(name, name)]
        rows.append(
            {
                "what": name,
                "seconds": cost.seconds,
                "computing_seconds": cost.cpu_seconds,
                "times_reference": reference.seconds / cost.seconds,
                "times_reference_computing": reference.cpu_seconds / cost.cpu_seconds,
            }
        )
    return finish(args, "end_to_end", device, rows)


if __name__ == "__main__":
    main()
