"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tortoise_hf.config import CallbackConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainingConfig

GOLDEN = Path(__file__).parent / "golden"
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
    return Path(__file__).resolve().parents[1]


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
    """A config with test-sized defaults; `section__name=value` sets one setting."""
    sections = {"data": {"root": "x"}, "model": {}, "optim": {"learning_rate": 1e-3}, "callbacks": {}}
    sections["training"] = {"output_dir": str(tmp_path / "run"), "batch_size": 4, "micro_batch_size": 4}
    for key, value in settings.items():
        section, name = key.split("__")
        sections[section][name] = value
    return Config(
        data=DataConfig(**sections["data"]),
        model=ModelConfig(**sections["model"]),
        optim=OptimConfig(**sections["optim"]),
        training=TrainingConfig(**sections["training"]),
        callbacks=CallbackConfig(**sections["callbacks"]),
    )
