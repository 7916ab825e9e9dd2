"""Every file in configs/ says what it means and loads."""

import re

import pytest
import yaml
from conftest import REPOSITORY

from tortoise_hf.cli import load_config
from tortoise_hf.config import Config
from tortoise_hf.dvae_config import DVAERunConfig
from tortoise_hf.memory import step_memory
from tortoise_hf.models.gpt import GPTConfig

RECIPES = sorted(REPOSITORY.glob("configs/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_it_loads(path):
    cfg = load_config(["--config", str(path)], "x", DVAERunConfig if "dvae" in path.stem else Config)
    for section, values in yaml.safe_load(path.read_text()).items():
        for name, value in values.items():
            assert getattr(getattr(cfg, section), name) == value, f"{section}.{name}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_setting_has_its_reason(path):
    for line in path.read_text().splitlines():
        if re.match(r"  \w+:", line):
            assert re.search(r"\S {2,}# \S", line), f"{path.name}: {line.strip()} has no comment"


def test_the_demo_needs_no_network():
    cfg = load_config(["--config", str(REPOSITORY / "configs" / "demo.yaml")], "x")
    for place in (cfg.data.root, cfg.model.base):
        assert (REPOSITORY / place).is_dir()
    assert not cfg.model.from_scratch


@pytest.mark.parametrize(
    ("name", "mixed_precision", "gib"), [("t4", "fp16", 14), ("8gb", "bf16", 7.5), ("lora", "fp16", 7)]
)
def test_recipes_for_small_cards_fit_on_them_at_full_length(name, mixed_precision, gib):
    """As computed; their comments give the figure."""
    text = (REPOSITORY / "configs" / f"{name}.yaml").read_text()
    cfg = load_config(["--config", str(REPOSITORY / "configs" / f"{name}.yaml")], "x")
    assert (cfg.data.max_samples, cfg.model.base) == (255_995, "released")
    training = cfg.training
    found = step_memory(
        cfg, GPTConfig(), mixed_precision, training.micro_batch_size, cfg.model.gradient_checkpointing
    ).total
    assert found <= gib * 2**30
    said = float(re.search(r"([\d.]+) GiB \(computed\) at full length", text)[1])
    assert said == pytest.approx(found / 2**30, rel=0.05)
    assert f"one_gpu_{mixed_precision}.yaml" in text
