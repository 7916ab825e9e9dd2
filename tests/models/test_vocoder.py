"""The vocoder: golden waveform, the released key tables, and what surrounds the network."""

from __future__ import annotations

import json

import pytest
import torch
from chain_models import golden_vocoder
from conftest import reference_path
from transformers import UnivNetModel

from tortoise_hf.models.vocoder import EXTRA_FRAMES, RELEASED_VOCODER, convert_vocoder_weights, vocode


@pytest.fixture(scope="module")
def golden():
    return golden_vocoder()


def test_golden_waveform(golden):
    model, tensors = golden
    waveform = vocode(model, tensors["in.mel"], tensors["in.z"])
    torch.testing.assert_close(waveform, tensors["out.wav"][:, 0], atol=1e-4, rtol=0)


def test_a_seed_gives_one_waveform(golden):
    model, tensors = golden
    first, second, other = (
        vocode(model, tensors["in.mel"], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (1, tensors["in.mel"].shape[2] * 256)
    assert tensors["in.z"].shape[2] - tensors["in.mel"].shape[2] == EXTRA_FRAMES


@pytest.mark.parametrize("name", ["vocoder_raw", "vocoder_inference"])
def test_released_names_map_onto_transformers_model(name):
    table = json.loads(reference_path(f"state_dict_keys/{name}.json").read_text())
    with torch.device("meta"):
        weights = {key: torch.empty(entry["shape"]) for key, entry in table.items()}
        state = UnivNetModel(RELEASED_VOCODER).state_dict()
    converted = convert_vocoder_weights(weights)
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items()
    }
