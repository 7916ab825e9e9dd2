"""Fixtures every test may use."""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from tortoise_hf.config import (
    CallbackConfig,
    Config,
    DataConfig,
    HubConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SamplesConfig,
    TrainingConfig,
)

# Some tests fork. OpenMP's threads don't survive that, and a forked process would wait for them forever; with one there
# is none to lose. Set before torch is imported; programs that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


def reference_path(name: str) -> Path:
    """Path of a released file that the repository doesn't hold; skips the test where it isn't at hand."""
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"needs the released {name}, which is not part of the repository (looked for it in {REFERENCE})")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """Top folder of the checkout."""
    return REPOSITORY


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as it is run: with its own folder in front of the search path."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


def golden_gpt(dropout: float = 0.0):
    """The small GPT of golden/gpt.safetensors, in evaluation mode."""
    from safetensors.torch import load_file

    from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

    config = GPTConfig(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_text_tokens=255,
        max_text_tokens=40,
        num_mel_codes=256,
        max_mel_tokens=60,
        dropout=dropout,
    )
    model = TortoiseGPT(config)
    state = load_file(GOLDEN / "gpt.safetensors")
    model.load_state_dict({key[3:]: value for key, value in state.items() if key.startswith("sd.")})
    return model.eval()


def make_config(tmp_path: Path, **settings) -> Config:
    """A config with test-sized defaults and nothing left to the plan; `section__name=value` sets one setting."""
    sections = {"data": {"root": "x"}, "model": {"gradient_checkpointing": False}}
    sections["optim"] = {"learning_rate": 1e-3, "lr_schedule": "cosine", "warmup_steps": 0}
    sections["callbacks"] = {"early_stopping_patience": 0}
    sections["lora"] = {}
    sections["samples"], sections["hub"] = {}, {}
    sections["training"] = {"output_dir": str(tmp_path / "run"), "batch_size": 4, "micro_batch_size": 4}
    sections["training"] |= {"eval_batch_size": 8, "num_train_epochs": 20}
    sections["training"] |= {"logging_steps": 10, "eval_steps": 50, "save_steps": 50}
    for key, value in settings.items():
        section, name = key.split("__")
        sections[section][name] = value
    return Config(
        data=DataConfig(**sections["data"]),
        model=ModelConfig(**sections["model"]),
        lora=LoraConfig(**sections["lora"]),
        optim=OptimConfig(**sections["optim"]),
        training=TrainingConfig(**sections["training"]),
        callbacks=CallbackConfig(**sections["callbacks"]),
        samples=SamplesConfig(**sections["samples"]),
        hub=HubConfig(**sections["hub"]),
    )


SENTENCES = (
    "The kettle is on.",
    "A dog barked at noon.",
    "Seven boats left the harbour.",
    "Rain fell on the tin roof all night.",
    "He said yes!",
    "Why not, then?",
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a one-layer GPT's config, a tokenizer, norms and a random DVAE."""
    return make_tiny_base(tmp_path_factory.mktemp("base"))


def make_tiny_base(folder: Path) -> Path:
    """What `tiny_base` is, without pytest."""
    import torch
    from safetensors.torch import save_file

    from tortoise_hf.models.dvae import DVAE, DVAEConfig
    from tortoise_hf.models.gpt import GPTConfig
    from tortoise_hf.text import train_tokenizer

    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(SENTENCES, 60)
    tokenizer.save(folder / "tokenizer.json")
    GPTConfig(
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        num_text_tokens=tokenizer.vocab_size,
        num_mel_codes=16,
        num_conditioning_layers=1,
        dropout=0.0,
    ).save_pretrained(folder)
    save_file({"mel_norms": torch.full((80,), -4.0)}, folder / "mel_norms.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DVAE(DVAEConfig(hidden_size=16, codebook_dim=8, num_codes=16, num_resnet_blocks=1)).save_pretrained(
            folder / "dvae"
        )
    return folder


@pytest.fixture
def tiny_voice(tmp_path: Path):
    """Makes an LJSpeech folder with so many clips of tones and noise, between 0.7 and 2 s."""

    def make(num_clips: int, name: str = "voice") -> Path:
        return make_tiny_voice(tmp_path / name, num_clips)

    return make


def make_tiny_voice(folder: Path, num_clips: int) -> Path:
    """What `tiny_voice` makes, without pytest."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    (folder / "wavs").mkdir(parents=True)
    lines = []
    for index in range(num_clips):
        seconds = rng.uniform(0.7, 2.0)
        time = np.arange(int(seconds * 22_050)) / 22_050
        waveform = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(folder / "wavs" / f"clip-{index}.wav", waveform, 22_050)
        lines.append(f"clip-{index}|{SENTENCES[index % len(SENTENCES)]} Take {chr(97 + index)}.")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


TOKEN = "hf_" + "aBcDeFgH" * 4 + "Jk"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hub on loopback that the Hub's client talks to, logged in as `me`; caches are this test's own."""
    import datasets
    import huggingface_hub
    from hub_server import Account, HubServer

    with HubServer() as server:
        server.accounts = {TOKEN: Account("me", orgs=("my-org",))}
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", server.url)  # for processes started by the test
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "hf" / "xet"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def small_disk(tmp_path: Path):
    """Makes a file system of so many bytes; needs root."""
    mounted = []

    def make(size: str, name: str = "disk") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"can't mount a small disk here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
