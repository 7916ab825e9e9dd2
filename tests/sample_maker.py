"""Samples of tiny runs: the golden GPT with files and recordings that fit it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import make_config, make_tiny_voice

from tortoise_hf.audio import num_codes
from tortoise_hf.config import ModelConfig
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.pretrained import resolve_base
from tortoise_hf.sample_sentences import Sentence
from tortoise_hf.samples import Samples

NUM_CLIPS = 2


def make_files(folder: Path, tiny_base: Path):
    """A base for the golden GPT, and a dataset of a few clips: (files, dataset's folder)."""
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    (base / "config.json").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=256, num_resnet_blocks=1)
        DVAE(small).save_pretrained(base / "dvae")
    files = resolve_base(ModelConfig(base=str(base), from_scratch=True))
    return files, make_tiny_voice(folder / "voice", NUM_CLIPS)


def make_samples(tmp_path: Path, files, voice: Path, **settings) -> tuple[Samples, object]:
    """Samples of a recorded sentence and of one that nobody recorded, and the config of their run."""
    cfg = make_config(tmp_path, data__root=str(voice), data__cache_dir=str(tmp_path / "cache"), **settings)
    path = str(voice / "wavs" / "clip-0.wav")
    codes = np.random.default_rng(0).integers(0, 256, num_codes(11_025))
    recorded = Sentence("The kettle is on. Take a.", "clip-0", False, path, tuple(codes.tolist()), 0.5)
    sentences = [recorded, Sentence("Why <not> & then?")]
    samples = Samples(cfg, sentences, [f"clip-{n}" for n in range(NUM_CLIPS)], torch.device("cpu"), files)
    samples.max_seconds = 0.6  # a dozen codes: quickly made
    return samples, cfg
