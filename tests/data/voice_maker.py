"""Small datasets in LJSpeech's layout, and a DVAE and a tokenizer for them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

from tortoise_hf.audio import SAMPLE_RATE
from tortoise_hf.config import DataConfig
from tortoise_hf.data.prepare import Prepared, prepare_dataset
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.text import TextTokenizer, train_tokenizer

GOLDEN_DVAE = Path(__file__).resolve().parents[1] / "golden" / "dvae.safetensors"
WORDS = ["stone", "river", "winter", "garden", "yellow", "copper", "window"]
NAMES = ["silver", "mountain", "engine", "candle", "harbour", "meadow", "thunder", "paper"]

MEL_NORMS = torch.linspace(-9.5, -1.6, 80)


def waveform(num_samples: int, seed: int = 0) -> np.ndarray:
    """Sound that changes all the time: a gliding tone with noise that comes and goes."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * (200 + 150 * rng.random()) * time * (1 + 0.3 * time))
    noise = rng.normal(size=num_samples) * (np.sin(2 * np.pi * 3 * time) > 0)
    return (0.4 * tone + 0.15 * noise).astype(np.float32)


def sentence(number: int) -> str:
    """A text that no other number has."""
    return f"{WORDS[number % 7]} {NAMES[number // 7 % 8]} and then the {WORDS[number // 56 % 7]} {NAMES[number % 8]}"


def write_clip(path: Path, seconds: float, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform(round(seconds * SAMPLE_RATE), seed), SAMPLE_RATE, "PCM_16")


def make_voice(root: Path, seconds: list[float]) -> Path:
    """A folder with metadata.csv and one clip for each entry of `seconds`, clip-000 and so on."""
    for number, length in enumerate(seconds):
        write_clip(root / "wavs" / f"clip-{number:03}.wav", length, seed=number)
    write_list(root / "metadata.csv", [(f"clip-{number:03}", sentence(number)) for number in range(len(seconds))])
    return root


def write_list(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(f"{clip}|{text}|{text}\n" for clip, text in rows), encoding="utf-8")


@functools.cache
def load_dvae() -> DVAE:
    """The golden DVAE: 64 codes."""
    model = DVAE(DVAEConfig(hidden_size=32, codebook_dim=16, num_codes=64))
    state = load_file(GOLDEN_DVAE)
    model.load_state_dict({key[3:]: value for key, value in state.items() if key.startswith("sd.")})
    return model.eval()


def refuse_to_load() -> DVAE:
    raise AssertionError("the DVAE was loaded although nothing had to be encoded")


@functools.cache
def tokenizer() -> TextTokenizer:
    return train_tokenizer([sentence(number) for number in range(40)], vocab_size=80)


def config(root: Path, **settings) -> DataConfig:
    return DataConfig(**{"root": str(root), "cache_dir": str(root.parent / "cache"), **settings})


def prepare(root: Path, dvae=load_dvae, **settings) -> Prepared:
    return prepare_dataset(
        config(root, **settings), tokenizer(), MEL_NORMS, dvae, dvae_fingerprint="golden", show_progress=False
    )
