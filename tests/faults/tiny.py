"""What the processes of the harness do: train a tiny GPT on random ids, with the package's own parts throughout."""

from __future__ import annotations

from pathlib import Path

import datasets  # noqa: F401 - imported once by the fork server
import torch
from conftest import golden_gpt
from test_loop import RandomExamples

from tortoise_hf.callbacks import build_callbacks
from tortoise_hf.cli import run as run_main
from tortoise_hf.config import Config
from tortoise_hf.data.collate import Collator
from tortoise_hf.data.loader import EvalBatches, TrainBatches
from tortoise_hf.data.sampler import StepSampler
from tortoise_hf.loop import train
from tortoise_hf.lora import add_adapter
from tortoise_hf.machine import start_accelerator
from tortoise_hf.optim import build_lr_scheduler, build_optimizer
from tortoise_hf.run import check_run_folder, open_run, start_or_resume


class Dataset(RandomExamples):
    """Random clips; clip 5 is as the test wants it."""

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.clip_ids = [f"clip-{index}" for index in range(num_clips)]


def train_tiny(cfg: Config, num_clips: int = 9, prepare=None) -> dict:
    """A run from start or checkpoint to its end, as scripts/train.py does it.

    Args:
        cfg: complete settings.
        num_clips: to train on; also evaluated on.
        prepare: called with a dict of the parts (model, dataset, callbacks, accelerator) before the first step.
    """
    result = {}
    run_main(lambda: result.update(_train(cfg, num_clips, prepare)))
    return result


def _train(cfg: Config, num_clips: int, prepare) -> dict:
    check_run_folder(cfg)
    accelerator = start_accelerator(cfg.training.seed)
    model, dataset = golden_gpt(dropout=0.1), Dataset(num_clips)
    if cfg.lora.rank > 0:
        add_adapter(model, cfg.lora, cfg.training.seed)
    training = cfg.training
    collate = Collator.for_model(model.config, cfg.data.padding)
    processes = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    sampler = StepSampler(
        dataset.lengths, training.batch_size, training.micro_batch_size, seed=training.seed, **processes
    )
    batches = TrainBatches(dataset, sampler, collate, cfg.data.num_workers)
    eval_sampler = StepSampler(dataset.lengths, num_clips, training.eval_batch_size, **processes)
    eval_batches = EvalBatches(dataset, eval_sampler, collate)
    run = open_run(cfg, accelerator, dict.fromkeys(dataset.clip_ids, ""), batches.steps_per_epoch)
    optimizer = build_optimizer(model, cfg.optim)
    scheduler = build_lr_scheduler(optimizer, cfg.optim, run.max_steps)
    plain = model
    model, optimizer = accelerator.prepare(model, optimizer)
    callbacks = build_callbacks(cfg, accelerator)
    state = start_or_resume(cfg, run, accelerator, model, optimizer, scheduler, callbacks)
    if prepare is not None:
        prepare({"model": plain, "dataset": dataset, "callbacks": callbacks, "accelerator": accelerator})
    state = train(cfg, accelerator, model, optimizer, scheduler, batches, eval_batches, callbacks, state)
    accelerator.wait_for_everyone()
    return {
        "kind": accelerator.distributed_type.value,
        "random": torch.get_rng_state(),
        "state": state.log_history,
        "micro_batch_size": sampler.micro_batch_size,
        "best": state.best_model_checkpoint,
        "checkpoints": sorted(path.name for path in Path(training.output_dir).glob("checkpoint-*")),
    }
