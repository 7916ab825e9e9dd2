"""The first part of every script: find the base's files and turn the dataset into examples for it."""

from __future__ import annotations

from functools import partial

from accelerate import Accelerator

from tortoise_hf.config import Config
from tortoise_hf.data.ljspeech import read_rows
from tortoise_hf.data.prepare import Prepared, prepare_dataset
from tortoise_hf.models.pretrained import BaseFiles, load_dvae, load_mel_norms, load_tokenizer, resolve_base


def prepare_base_and_data(cfg: Config, accelerator: Accelerator) -> tuple[BaseFiles, Prepared]:
    """Read the dataset's lists, fetch what the base lacks, encode what isn't cached.

    The lists come first: a mistyped folder should be named before gigabytes are fetched.

    Raises:
        UserError: if the data or the base can't be had, or no clip is usable.
    """
    rows = read_rows(cfg.data)
    files = resolve_base(cfg.model)
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
