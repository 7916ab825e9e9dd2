"""Steps per second with `hub.push: every_eval` on a Hub that takes in 1 MB/s, against none: a measurement, not a test.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/push_throughput.py --rounds 3

Trains a GPT of 11 million weights on random ids, with and without pushes in turns. Both runs evaluate and save at the
same steps. One voice is about 90 MB, so a push is in flight all the time. With `taskset` training and pushes share one
processor, which is the hardest case; the Hub, which would be elsewhere, takes another one if there is one. At the end a
push alone is measured, on a Hub that takes in all it gets.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

STEPS, EVERY = 60, 20
BYTES_PER_SECOND = 1_000_000.0


def serve(connection, bytes_per_second: float) -> None:
    """The slow Hub."""
    from hub_server import Account, HubServer

    if hasattr(os, "sched_setaffinity"):
        others = set(range(os.cpu_count())) - os.sched_getaffinity(0)
        os.sched_setaffinity(0, others or os.sched_getaffinity(0))
    with HubServer() as hub:
        hub.accounts = {"hf_" + "a" * 34: Account("me")}
        hub.bytes_per_second = bytes_per_second
        connection.send(hub.url)
        connection.recv()
        hub.bytes_per_second = None
        connection.send("open")
        connection.recv()
        received = sum(len(data) for data in hub.objects.values())
        connection.send((received, hub.repositories["me/voice"].titles() if "me/voice" in hub.repositories else []))


def child_seconds() -> float:
    """Processor time of the pushing processes that this one started."""
    over = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = [child.cpu_times() for child in psutil.Process().children()]
    return over.ru_utime + over.ru_stime + sum(times.user + times.system for times in running)


def train_once(folder: Path, base: Path, repo_id: str | None) -> tuple[float, float, float]:
    """(seconds, processor time of the training thread, of the pushes) per step, evaluations and saves included."""
    import torch
    from accelerate.state import AcceleratorState
    from conftest import make_config
    from faults.tiny import Dataset
    from transformers import TrainerCallback

    from tortoise_hf.callbacks import build_callbacks
    from tortoise_hf.config import ModelConfig
    from tortoise_hf.data.collate import Collator
    from tortoise_hf.data.loader import EvalBatches, TrainBatches
    from tortoise_hf.data.sampler import StepSampler
    from tortoise_hf.loop import train
    from tortoise_hf.machine import start_accelerator
    from tortoise_hf.models.pretrained import load_gpt, resolve_base
    from tortoise_hf.optim import build_lr_scheduler, build_optimizer
    from tortoise_hf.run import open_run, start_or_resume

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.began = time.perf_counter(), time.thread_time(), child_seconds()
            if state.global_step == STEPS:
                self.ended = time.perf_counter(), time.thread_time(), child_seconds()

    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"training__max_steps": STEPS, "training__eval_steps": EVERY, "training__save_steps": EVERY}
    settings |= {"callbacks__progress": False, "model__base": str(base), "model__from_scratch": True}
    settings |= {"training__batch_size": 4, "training__micro_batch_size": 4, "data__num_conditioning_clips": 2}
    settings |= {"hub__repo_id": repo_id, "hub__consent": "Nobody's.", "hub__push": "every_eval"}
    cfg = make_config(folder, **settings, training__output_dir=str(folder))
    accelerator = start_accelerator(1)
    files = resolve_base(ModelConfig(base=str(base), from_scratch=True))
    model, dataset = load_gpt(files, from_scratch=True), Dataset(8)
    collate = Collator.for_model(model.config, "mask")
    batches = TrainBatches(dataset, StepSampler(dataset.lengths, 4, 4, seed=1), collate)
    eval_batches = EvalBatches(dataset, StepSampler(dataset.lengths, 8, 4), collate)
    run = open_run(cfg, accelerator, dict.fromkeys(dataset.clip_ids, ""), batches.steps_per_epoch)
    optimizer = build_optimizer(model, cfg.optim)
    scheduler = build_lr_scheduler(optimizer, cfg.optim, run.max_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    clock = Clock()
    callbacks = [*build_callbacks(cfg, accelerator, files), clock]
    for callback in callbacks:
        if hasattr(callback, "pusher"):
            callback.on_train_end = lambda *args, **kwargs: None  # its patience after the last step is not measured
    state = start_or_resume(cfg, run, accelerator, model, optimizer, scheduler, callbacks)
    torch.manual_seed(0)
    train(cfg, accelerator, model, optimizer, scheduler, batches, eval_batches, callbacks, state)
    return tuple((end - start) / (STEPS - 1) for start, end in zip(clock.began, clock.ended, strict=True))


def measure_in_process(folder: str, base: str, repo_id: str | None, connection) -> None:
    """A process per run, so that none inherits another's threads."""
    connection.send(train_once(Path(folder), Path(base), repo_id))
    os._exit(0)  # the push in flight ends with the process


def push_alone(run_dir: Path) -> tuple[float, float]:
    """(bytes of a voice, processor time of pushing it) with nothing else going on."""
    from tortoise_hf.checkpoint import MANIFEST
    from tortoise_hf.hub.publish import HUB_DIR
    from tortoise_hf.hub.voice_folder import link_file

    staging = run_dir / HUB_DIR / "alone"
    for name in ("model.safetensors", "config.json", "trainer_state.json", MANIFEST):
        link_file(run_dir / f"checkpoint-{STEPS}" / name, staging / "checkpoint" / name)
    (staging / "step.json").write_text(json.dumps({"step": STEPS, "lineage": ["random weights"]}))
    before = child_seconds()
    command = [sys.executable, "-m", "tortoise_hf.hub.worker", str(run_dir), str(staging)]
    # Its input stays open: the end of it means that the run is gone.
    with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:
        if worker.wait():
            sys.exit("The push alone failed.")
    return sum(path.stat().st_size for path in (staging / "voice").rglob("*")), child_seconds() - before


def main() -> None:
    """Run both kinds in turns and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, BYTES_PER_SECOND), daemon=True).start()
    os.environ |= {"HF_ENDPOINT": ours.recv(), "HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_DISABLE_XET": "1"}
    times: dict[str | None, list[tuple[float, float, float]]] = {None: [], "me/voice": []}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        for number in range(rounds):
            for repo_id in list(times) if number % 2 == 0 else list(times)[::-1]:
                here, there = context.Pipe()
                where = Path(folder) / f"{number}-{repo_id is not None}"
                context.Process(target=measure_in_process, args=(str(where), str(base), repo_id, there)).start()
                times[repo_id].append(here.recv())
                wall, computing, pushing = times[repo_id][-1]
                print(
                    f"{'with' if repo_id else 'without'} pushes: {wall:.4f} s a step, of processor time "
                    f"{computing:.4f} s for training and {pushing:.4f} s for pushes",
                    flush=True,
                )
        ours.send("stop being slow")
        ours.recv()
        size, seconds = push_alone(Path(folder) / f"{rounds - 1}-True")
    ours.send("done")
    received, titles = ours.recv()
    without, with_pushes = (statistics.median(wall for wall, *_ in times[key]) for key in (None, "me/voice"))
    print(f"The Hub took in {received / 1e6:.0f} MB; commits: {titles}")
    print(f"A push of {size / 1e6:.0f} MB alone takes {seconds:.1f} s of processor time.")
    print(f"steps per second with pushes / without: {100 * without / with_pushes:.1f} % (medians of {rounds})")
    without, with_pushes = (statistics.median(cpu for _, cpu, _ in times[key]) for key in (None, "me/voice"))
    print(f"the same by processor time of the training thread: {100 * without / with_pushes:.1f} %")


def make_base(folder: Path) -> Path:
    """A GPT's sizes with what lies beside it."""
    import torch
    from conftest import SENTENCES
    from safetensors.torch import save_file

    from tortoise_hf.models.dvae import DVAE, DVAEConfig
    from tortoise_hf.models.gpt import GPTConfig
    from tortoise_hf.text import train_tokenizer

    folder.mkdir()
    train_tokenizer(SENTENCES, 60).save(folder / "tokenizer.json")
    GPTConfig(
        num_layers=12, hidden_size=256, num_heads=4, num_mel_codes=256, num_conditioning_layers=1
    ).save_pretrained(folder)
    save_file({"mel_norms": torch.full((80,), -4.0)}, folder / "mel_norms.safetensors")
    config = DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=256, num_resnet_blocks=1)
    DVAE(config).save_pretrained(folder / "dvae")
    return folder


if __name__ == "__main__":
    main()
