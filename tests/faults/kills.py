"""Stop the training script again and again, at random moments and inside saves, until its runs are done.

    python tests/faults/kills.py --kills 20 --seed 0

starts the same command anew after every SIGKILL and Ctrl-C and compares each run that ends with one that was left
alone: weights, optimizer, random numbers, log, exported file. `test_kills.py` does the same with fewer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(TESTS) in sys.path else [str(TESTS)]

from faults.harness import log_of, start  # noqa: E402

STEPS = 12
KINDS = ("at random", "in a save", "Ctrl-C")


def flags(base: Path, data: Path, folder: Path, output_dir: Path, **settings) -> list[str]:
    """A run of a few steps of the training script, nothing left to the plan."""
    values = {
        "data.root": data,
        "data.cache_dir": folder / "cache",
        "data.num_conditioning_clips": 1,
        "data.conditioning_seconds": 0.5,
        "data.min_eval_clips": 2,
        "model.base": base,
        "model.from_scratch": "true",
        "model.gradient_checkpointing": "false",
        "optim.learning_rate": 1e-3,
        "optim.lr_schedule": "cosine",
        "optim.warmup_steps": 2,
        "training.output_dir": output_dir,
        "training.max_steps": STEPS,
        "training.batch_size": 4,
        "training.micro_batch_size": 2,
        "training.eval_batch_size": 4,
        "training.logging_steps": 3,
        "training.eval_steps": 4,
        "training.save_steps": 2,
        "training.save_total_limit": 1,
        "callbacks.progress": "false",
        "callbacks.early_stopping_patience": 0,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def train_script(argv: list[str], file_operations: int | None = None) -> None:
    """Call scripts/train.py; kill this process before the given number of writes, renames and deletions of a save."""
    sys.path.insert(0, str(TESTS.parent / "scripts"))
    import train

    if file_operations is not None:
        _die_in_a_save(file_operations)
    train.main(argv)


def _die_in_a_save(count: int) -> None:
    import torch

    from tortoise_hf import checkpoint

    left = [count]

    def dying(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, names in ((checkpoint, ("_sync", "_write_json", "_write_manifest")), (torch, ("save",))):
        for name in names:
            setattr(module, name, dying(getattr(module, name)))
    Path.rename = dying(Path.rename)
    shutil.rmtree = dying(shutil.rmtree)


def undisturbed_seconds(argv: list[str], folder: Path) -> float:
    """Seconds of a run that is left alone and finds everything prepared."""
    began = time.monotonic()
    started = start(folder, train_script, argv)
    assert started.wait() == [0], started.output()
    return time.monotonic() - began


def with_dropout(base: Path, folder: Path) -> Path:
    """A copy of a base whose steps depend on random numbers."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout": 0.1}))
    return folder


def survive(base: Path, data: Path, folder: Path, kills: int, seed: int, say=print) -> dict[str, int]:
    """Kill `kills` times and finish; `AssertionError` if a run ends otherwise than the undisturbed one.

    Returns: how many kills came at random moments, how many inside saves, how many of them were Ctrl-C, and how many
        runs ended.
    """
    chance = random.Random(seed)
    whole = folder / "whole"
    base = with_dropout(base, folder / "base_with_dropout")
    undisturbed_seconds(flags(base, data, folder, whole), folder / "processes")
    again = flags(base, data, folder, folder / "again")
    seconds = undisturbed_seconds(again, folder / "processes")
    check_equal(whole, folder / "again")
    counts = {"at random": 0, "in a save": 0, "Ctrl-C": 0, "runs": 0}
    done = 0
    while done < kills or (folder / "broken").exists():
        argv = flags(base, data, folder, folder / "broken")
        kind = KINDS[done % len(KINDS)] if done < kills else None
        operations = chance.randrange(40) if kind == "in a save" else None
        started = start(folder / "processes", train_script, argv, operations)
        if kind in ("at random", "Ctrl-C"):
            started.processes[0].join(chance.uniform(0.3, 1) * seconds)
            number = signal.SIGKILL if kind == "at random" else signal.SIGINT
            if started.processes[0].is_alive():
                os.kill(started.processes[0].pid, number)
        (code,) = started.wait()
        if code in (-signal.SIGKILL, 130):
            counts[kind] += 1
            done += 1
            state = sorted(path.name for path in (folder / "broken").glob("*checkpoint*"))
            say(f"{done}: stopped {kind}; left: {', '.join(state) or 'nothing'}")
            continue
        assert code == 0, started.output()
        check_equal(whole, folder / "broken")
        counts["runs"] += 1
        shutil.rmtree(folder / "broken")
    return counts


def check_equal(whole: Path, broken: Path) -> None:
    """The same weights, optimizer, random numbers, schedule, log and final evaluation; nothing half-written left."""
    from faults.test_resume import assert_equal_checkpoints

    assert_equal_checkpoints(whole / f"checkpoint-{STEPS}", broken / f"checkpoint-{STEPS}", moments=5)
    assert log_of(whole) == log_of(broken)
    assert [entry for entry in log_of(broken) if "eval_loss" in entry][-1]["step"] == STEPS
    assert json.loads((broken / "run.json").read_text())["finished_step"] == STEPS
    left, expected = (sorted(path.name for path in folder.iterdir()) for folder in (broken, whole))
    assert left == expected, f"{left} instead of {expected}"
    exported = (whole / "export" / "model.safetensors").read_bytes()
    assert (broken / "export" / "model.safetensors").read_bytes() == exported


def main() -> None:
    """Run it with as many kills as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import conftest

    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder, "base"), Path(folder, "voice")
        conftest.make_tiny_base(base)
        conftest.make_tiny_voice(data, 10)
        began = time.monotonic()
        counts = survive(base, data, Path(folder), args.kills, args.seed)
        print(
            f"{args.kills} of {args.kills} survived: {counts['at random']} SIGKILLs at random moments, "
            f"{counts['in a save']} inside saves, {counts['Ctrl-C']} times Ctrl-C; {counts['runs']} runs ended equal "
            f"to the undisturbed one; {time.monotonic() - began:.0f} s."
        )


if __name__ == "__main__":
    main()
