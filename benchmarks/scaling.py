"""What more clips cost, and what more processes bring: time and memory of the host against the size of a dataset.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/scaling.py --clips 256 1024 4096
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --clips 820 3275 13100 --processes 1 2

`clips`: examples are made and stored as prepared ones are, then a fresh process opens them, plans an epoch and fetches
the same number of micro-batches from each size. Its own memory (anonymous, what the dataset can't be dropped from) has
to stay flat: examples are memory-mapped. `processes`: the demo trains for a few steps in so many processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import synthetic
import torch
from measuring import add_common_arguments, finish
from reference_step import BATCH_SIZE
from sizes import SIZES

from tortoise_hf.data.collate import Collator, ExampleDataset
from tortoise_hf.data.conditioning import ConditioningDraws
from tortoise_hf.data.loader import TrainBatches
from tortoise_hf.data.sampler import StepSampler

REPOSITORY = Path(__file__).resolve().parents[1]


def own_memory() -> int:
    """Bytes of this process that no file on disk holds."""
    try:
        status = Path("/proc/self/status").read_text()  # Linux
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def fetch(folder: Path, num_clips: int, num_batches: int, batch_size: int) -> dict[str, float]:
    """Open prepared examples, plan, fetch: what a fresh process does."""
    before = own_memory()
    started = time.perf_counter()
    examples = synthetic.open_prepared(folder, synthetic.ljspeech_shapes(num_clips))
    draws = ConditioningDraws(examples, synthetic.random_norms())
    dataset = ExampleDataset(examples, draws)
    opened = time.perf_counter()
    sampler = StepSampler(np.array(examples["num_positions"]), min(BATCH_SIZE, num_clips), batch_size)
    steps = TrainBatches(dataset, sampler, Collator.for_model(SIZES["released"][0])).steps()
    micro_batches = itertools.chain.from_iterable(steps)
    next(micro_batches)
    planned = time.perf_counter()
    clips = sum(len(batch.indices) for batch in itertools.islice(micro_batches, num_batches))
    fetched = time.perf_counter()
    return {
        "open_seconds": opened - started,
        "plan_seconds": planned - opened,
        "clips_fetched_per_second": clips / (fetched - planned),
        "own_memory_mib": own_memory() / 2**20,
        "own_memory_of_the_data_mib": (own_memory() - before) / 2**20,
        "padding_share": sampler.padding_share(),
    }


def measure_clips(args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for every size of dataset."""
    rows = []
    for count in args.clips:
        place = folder / str(count)
        synthetic.prepared_examples(place, synthetic.ljspeech_shapes(count))
        size = sum(file.stat().st_size for file in place.rglob("*.arrow"))
        command = [sys.executable, __file__, "--fetch", str(place), "--clips", str(count)]
        command += ["--batches", str(args.batches), "--batch_size", str(args.batch_size)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append({"what": f"{count:,} clips", "stored_mib": size / 2**20, **answer})
    return rows


def measure_processes(args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for every number of processes that train the demo."""
    rows = []
    for count in args.processes:
        output = folder / f"run-{count}"
        settings = {
            "data.cache_dir": folder / "cache", "training.output_dir": output, "training.max_steps": args.steps,
            "training.eval_strategy": "no", "training.save_strategy": "no", "training.logging_steps": args.steps // 2,
            "training.micro_batch_size": 16 // count, "samples.enabled": "false",
        }  # fmt: skip
        launcher = ["--num_processes", str(count)] + (["--multi_gpu"] if count > 1 else [])
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_machines", "1"]
        command += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [str(REPOSITORY / "scripts" / "train.py"), "--config", str(REPOSITORY / "configs" / "demo.yaml")]
        command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {})
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        assert f"{count} process" in done.stdout, "the launcher started another number of processes"
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        speeds = [entry["clips_per_second"] for entry in log if "clips_per_second" in entry]
        rows.append({"what": f"{count} process{'es' * (count > 1)}", "clips_trained_per_second": speeds[-1]})
    return rows


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main(argv: list[str] | None = None) -> dict | None:
    """Measure, print, and give the numbers back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="*", default=[256, 1024, 4096], help="sizes of the dataset")
    parser.add_argument("--batches", type=int, default=100, help="micro-batches fetched of each size")
    parser.add_argument("--batch_size", type=int, default=8, help="clips of a micro-batch")
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="numbers of processes that train the demo")
    parser.add_argument("--steps", type=int, default=20, help="of each of these runs; the second half is timed")
    parser.add_argument("--fetch", type=Path, help=argparse.SUPPRESS)
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.fetch is not None:
        print(json.dumps(fetch(args.fetch, args.clips[0], args.batches, args.batch_size)))
        return None
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="tortoise_hf_scaling_") as folder:
        rows += measure_clips(args, Path(folder))
        rows += measure_processes(args, Path(folder))
    return finish(args, "scaling", torch.device(args.device), rows)


if __name__ == "__main__":
    main()
