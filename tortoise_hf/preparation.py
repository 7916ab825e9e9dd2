"""The first part of every script: find the base's files, turn the dataset into examples for it, plan the run."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.config import Config
from tortoise_hf.data.collate import Collator, ExampleDataset
from tortoise_hf.data.conditioning import ConditioningDraws
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.prepare import Prepared, look_over, prepare_dataset
from tortoise_hf.errors import UserError
from tortoise_hf.lora import add_adapter, num_weights
from tortoise_hf.measure import measure
from tortoise_hf.models.gpt import TortoiseGPT
from tortoise_hf.models.pretrained import BaseFiles, load_dvae, load_gpt, load_mel_norms, load_tokenizer, resolve_base
from tortoise_hf.plan import Facts, Measurement, Plan, choose_batch_size, resolve, share_per_process
from tortoise_hf.run import read_record


def prepare_base_and_data(cfg: Config, accelerator: Accelerator) -> tuple[BaseFiles, Prepared]:
    """Read the dataset's lists, fetch what the base lacks, encode what isn't cached.

    The lists come first: a mistyped folder should be named before gigabytes are fetched.

    Raises:
        UserError: if the data or the base can't be had, or no clip is usable.
    """
    rows = read_rows(cfg.data)
    try:
        files = resolve_base(cfg.model)
    except UserError:
        if rows.root is not None:  # what can be told of the recordings by then is told all the same
            accelerator.print(look_over(cfg.data, rows))
        raise
    prepared = prepare_dataset(
        cfg.data,
        load_tokenizer(files),
        load_mel_norms(files),
        partial(load_dvae, files),
        files.sha256("dvae_weights"),
        accelerator.device,
        show_progress=accelerator.is_main_process,
        raw=rows,
    )
    return files, prepared


def load_model(cfg: Config, files: BaseFiles) -> TortoiseGPT:
    """The GPT that is trained, on the CPU: the base's, with an adapter where `lora.rank` asks for one."""
    model = load_gpt(files, cfg.model.from_scratch, cfg.training.seed)
    if cfg.lora.rank > 0:
        add_adapter(model, cfg.lora, cfg.training.seed)
    return model


def make_plan(cfg: Config, accelerator: Accelerator, files: BaseFiles, data: Prepared, model: TortoiseGPT) -> Plan:
    """Settings without gaps, decided by the main process for all; every process calls it.

    A run that goes on keeps what it began with. Otherwise a few passes of the model are timed and weighed first.

    Args:
        cfg: settings as given.
        accelerator: of this process.
        files: of the base.
        data: what is trained on.
        model: the GPT, not yet prepared by the accelerator; its weights stay as they are.

    Raises:
        UserError: if the record of the run that goes on can't be read.
    """
    outcome: list[Plan | UserError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [_decide(cfg, accelerator, files, data, model)]
        except UserError as error:  # the others wait for an answer; they get this one
            outcome = [error]
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _decide(cfg: Config, accelerator: Accelerator, files: BaseFiles, data: Prepared, model: TortoiseGPT) -> Plan:
    weights, trained = num_weights(model)
    facts = Facts(
        num_train_clips=len(data.train),
        num_eval_clips=len(data.eval),
        minutes=sum(data.train["num_samples"]) / SAMPLE_RATE / 60,
        num_processes=accelerator.num_processes,
        num_parameters=weights,
        num_trained=trained,
        free_disk_bytes=_free_bytes(Path(cfg.training.output_dir)),
    )
    record = read_record(cfg)
    if record is not None:
        values = record.get("plan", {}).get("measurement")
        return resolve(cfg, facts, Measurement.from_dict(values) if values else None, earlier=record["config"])
    # A model that is sharded over processes may not fit on one of them whole, and speaks for nothing if it does.
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return resolve(cfg, facts)
    batch_size = cfg.training.batch_size or choose_batch_size(cfg, facts)[0]
    draws = ConditioningDraws(
        data.train, load_mel_norms(files), cfg.data.num_conditioning_clips, cfg.data.conditioning_seconds
    )
    measurement = measure(
        cfg,
        accelerator,
        model,
        ExampleDataset(data.train, draws),
        data.train["num_positions"],
        Collator.for_model(model.config, cfg.data.padding),
        share_per_process(batch_size, facts),
    )
    return resolve(cfg, facts, measurement)


def _free_bytes(folder: Path) -> int | None:
    """Free space where `folder` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
