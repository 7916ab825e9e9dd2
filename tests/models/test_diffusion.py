"""The diffusion decoder: golden vectors of each part and the released key table."""

from __future__ import annotations

import json

import pytest
import torch
from chain_models import golden_diffusion
from conftest import reference_path

from tortoise_hf.models.diffusion import DiffusionConfig, DiffusionDecoder, RelativePositions, distance_bucket


@pytest.fixture(scope="module")
def golden():
    return golden_diffusion()


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_golden_conditioning(golden):
    model, tensors = golden
    assert_near(model.encode_conditioning(tensors["in.cond_mels"]), tensors["out.cond_latent"])
    frames = tensors["in.noise"].shape[2]
    for name, source in (("", tensors["in.latents"]), ("_from_codes", tensors["in.codes"])):
        found = model.prepare(source, tensors["out.cond_latent"], frames)
        assert_near(found, tensors[f"out.timestep_independent{name}"])


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 1333, 3999])
def test_golden_outputs(golden, timestep):
    model, tensors = golden
    conditioning = tensors["out.timestep_independent"]
    times = torch.tensor([timestep])
    assert_near(model(tensors["in.noise"], times, conditioning), tensors[f"out.forward_t{timestep}"])
    found = model(tensors["in.noise"], times, model.unconditioned(conditioning))
    assert_near(found, tensors[f"out.forward_condfree_t{timestep}"])
    both = model(
        tensors["in.noise"].expand(2, -1, -1),
        times.expand(2),
        torch.cat([conditioning, model.unconditioned(conditioning)]),
    )
    assert_near(both, torch.cat([tensors[f"out.forward_t{timestep}"], tensors[f"out.forward_condfree_t{timestep}"]]))


def test_key_table_is_the_released_one():
    table = json.loads(reference_path("state_dict_keys/diffusion_decoder.json").read_text())
    with torch.device("meta"):
        state = DiffusionDecoder(DiffusionConfig()).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == {k: v["shape"] for k, v in table.items()}


@torch.no_grad()
def test_bias_is_that_of_the_distance():
    positions = RelativePositions(3, 2.0)
    bias = positions(90)
    assert bias.shape == (3, 90, 90)
    for query, key in ((0, 0), (5, 2), (2, 5), (0, 89), (89, 0), (40, 70)):
        bucket = int(distance_bucket(torch.tensor(key - query)))
        expected = positions.relative_attention_bias.weight[bucket] * 2.0
        assert torch.equal(bias[:, query, key], expected)
    assert distance_bucket(torch.tensor([-200, -64, -7, 0, 7, 64, 200])).tolist() == [15, 15, 7, 0, 23, 31, 31]
