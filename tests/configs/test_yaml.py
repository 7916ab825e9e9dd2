"""Every file in configs/ says what it means and loads."""

import re

import pytest
import yaml
from conftest import REPOSITORY

from tortoise_hf.cli import load_config
from tortoise_hf.config import Config
from tortoise_hf.dvae_config import DVAERunConfig

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
    assert cfg.model.from_scratch
