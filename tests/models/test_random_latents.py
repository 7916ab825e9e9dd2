"""The random latent generator: golden latents and the released key tables."""

from __future__ import annotations

import json

import pytest
import torch
from chain_models import golden_file, state_of
from conftest import reference_path

from tortoise_hf.models.random_latents import RandomLatents, RandomLatentsConfig


@torch.no_grad()
def test_golden_latents():
    tensors, sizes = golden_file("rlg")
    model = RandomLatents(RandomLatentsConfig(hidden_size=sizes["channels"], learning_rate_factor=sizes["lr_mul"]))
    model.load_state_dict(state_of(tensors), strict=True)
    torch.testing.assert_close(model(tensors["in.noise"]), tensors["out.latent"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, width", [("rlg_auto", 1024), ("rlg_diffuser", 2048)])
def test_key_table_is_the_released_one(name, width):
    table = json.loads(reference_path(f"state_dict_keys/{name}.json").read_text())
    with torch.device("meta"):
        state = RandomLatents(RandomLatentsConfig(hidden_size=width)).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {k: v["shape"] for k, v in table.items()}
