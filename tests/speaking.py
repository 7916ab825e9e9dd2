"""Helpers: a training batch made the way a run makes it, from recordings on disk and the default settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from tortoise_hf.config import Config
from tortoise_hf.data.collate import Batch
from tortoise_hf.data.loader import build_batches
from tortoise_hf.data.prepare import prepare_dataset
from tortoise_hf.data.sampler import Draw
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.models.pretrained import BaseFiles, load_dvae, load_mel_norms, load_tokenizer


@dataclass
class TrainingBatch:
    """A micro-batch and where each of its rows comes from."""

    batch: Batch
    clips: list[Path]
    """Recording each row is to predict."""
    conditioning_clips: list[list[Path]]
    """Recordings each row is conditioned on."""


def training_batch(cfg: Config, files: BaseFiles, gpt: GPTConfig, voice: Path) -> TrainingBatch:
    """The first micro-batch of a run's first epoch."""
    tokenizer, norms = load_tokenizer(files), load_mel_norms(files)
    dvae = partial(load_dvae, files)
    prepared = prepare_dataset(cfg.data, tokenizer, norms, dvae, files.sha256("dvae_weights"), show_progress=False)
    batches, _ = build_batches(cfg, Accelerator(cpu=True), prepared.train, prepared.eval, norms, gpt)
    batch = next(batches.steps())[0]
    paths = [voice / "wavs" / f"{Path(clip_id).stem}.wav" for clip_id in prepared.train["clip_id"]]
    draws = batches.dataset._conditioning
    chosen = [draws.choose(Draw(index, 0, 1))[0] for index in batch.indices.tolist()]
    return TrainingBatch(
        batch,
        [paths[index] for index in batch.indices.tolist()],
        [[paths[row] for row in np.asarray(rows).tolist()] for rows in chosen],
    )


def all_clips_in_one_batch(cfg: Config, **data) -> Config:
    """The settings with nothing held back and one micro-batch per step."""
    training = replace(cfg.training, batch_size=64, micro_batch_size=64)
    return replace(cfg, data=replace(cfg.data, eval_fraction=0.0, **data), training=training)


@torch.no_grad()
def first_position(model, batch: Batch) -> tuple[torch.Tensor, int]:
    """What stands in front of the text in the GPT's input, (B, D), and how many positions all rows have together."""
    seen = []
    hook = model.gpt.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model.eval()(**batch.model_inputs())
    finally:
        hook.remove()
    return seen[0][0, batch.packing.boundaries[:-1]], seen[0].shape[1]
