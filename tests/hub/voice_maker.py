"""A finished run without the training: the golden GPT as its best checkpoint, exported."""

from __future__ import annotations

import json
import os
import shutil

import torch
from accelerate import Accelerator
from conftest import golden_gpt, make_config
from transformers import TrainerState

from tortoise_hf.checkpoint import save_checkpoint
from tortoise_hf.config import OptimConfig
from tortoise_hf.export_run import export_run
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.optim import build_lr_scheduler, build_optimizer

CONSENT = "My own voice."
LOG = [
    {"step": 0, "eval_loss": 3.0, "eval_mel_loss": 2.9, "eval_text_loss": 5.0},
    {"step": 5, "loss": 2.5, "clips_per_second": 2.0},
    {"step": 5, "eval_loss": 2.25, "eval_mel_loss": 2.125, "eval_text_loss": 4.5},
]


def make_run(tmp_path, base, value=5.0, name="run", **settings):
    """A run's folder with one checkpoint and its export; every bias of the last norm is `value`."""
    own_base = tmp_path / f"{name}-base"
    shutil.copytree(base, own_base)
    golden_gpt().save_pretrained(own_base)
    small = DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=256, num_resnet_blocks=1)
    DVAE(small).save_pretrained(own_base / "dvae")
    settings = {"model__base": str(own_base), "data__root": str(tmp_path / "recordings"), **settings}
    cfg = make_config(tmp_path, **settings, training__output_dir=str(tmp_path / name))
    folder = tmp_path / name
    model = golden_gpt()
    with torch.no_grad():
        model.final_norm.bias.fill_(value)
    optimizer = build_optimizer(model, OptimConfig())
    scheduler = build_lr_scheduler(optimizer, OptimConfig(), max_steps=10)
    state = TrainerState(global_step=5, best_global_step=5, best_model_checkpoint="checkpoint-5", log_history=LOG)
    save_checkpoint(folder, Accelerator(cpu=True), model, optimizer, scheduler, state)
    (folder / "run.json").write_text(json.dumps({"config": cfg.to_dict(), "num_train_clips": 7, "cwd": os.getcwd()}))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    (folder / "dataset_report.json").write_text(json.dumps({"minutes": 12.3}))
    export_run(folder, folder / "export")
    return folder
