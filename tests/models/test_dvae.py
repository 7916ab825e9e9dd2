"""DVAE: the golden vectors of the released implementation, its key names, and independence of how the run computes."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, reference_path
from safetensors import safe_open
from safetensors.torch import load_file

from tortoise_hf.models.dvae import DVAE, FRAMES_PER_CODE, DVAEConfig, full_precision


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "dvae.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    with safe_open(GOLDEN / "dvae.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    config = DVAEConfig(
        num_mel_bins=sizes["channels"],
        hidden_size=sizes["hidden_dim"],
        codebook_dim=sizes["codebook_dim"],
        num_codes=sizes["num_tokens"],
        num_layers=sizes["num_layers"],
        num_resnet_blocks=sizes["num_resnet_blocks"],
        kernel_size=sizes["kernel_size"],
    )
    model = DVAE(config)
    model.load_state_dict({key[3:]: value for key, value in golden.items() if key.startswith("sd.")})
    return model


@pytest.mark.parametrize("case", "abc")
def test_golden_vectors(model, golden, case):
    mel = golden[f"in.mel_{case}"]
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(mel), golden[f"out.encoder_{case}"], atol=1e-4, rtol=0)
    codes = model.encode(mel)
    assert codes.dtype == torch.int64
    assert codes.tolist() == golden[f"out.codes_{case}"].tolist()
    torch.testing.assert_close(model.decode(codes), golden[f"out.decoded_{case}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames, codes", [(1, 1), (4, 1), (5, 2), (52, 13), (172, 43), (517, 130), (1000, 250)])
def test_one_code_stands_for_four_frames(model, frames, codes):
    assert model.encode(torch.zeros(1, 80, frames)).shape == (1, codes)
    assert model.decode(torch.zeros(1, codes, dtype=torch.int64)).shape == (1, 80, codes * FRAMES_PER_CODE)


def test_lowest_index_wins_a_tie(model, golden):
    codes = model.encode(golden["in.mel_a"])
    twin = DVAE(model.config)
    twin.load_state_dict(model.state_dict())
    first, last = int(codes.min()), model.config.num_codes - 1
    assert first != last
    twin.codebook.embed[:, last] = twin.codebook.embed[:, first]
    assert twin.encode(golden["in.mel_a"]).tolist() == codes.tolist()


def test_encoding_leaves_the_model_and_its_mode_alone(model, golden):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluated = model.eval().encode(golden["in.mel_b"])
    trained = model.train().encode(golden["in.mel_b"].requires_grad_())
    golden["in.mel_b"].requires_grad_(False)
    assert model.training
    assert not trained.requires_grad
    assert not model.decode(trained).requires_grad
    assert trained.tolist() == evaluated.tolist()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_codes_or_mels(model, golden, dtype):
    with torch.autocast("cpu", dtype=dtype):
        codes = model.encode(golden["in.mel_b"])
        mel = model.decode(codes)
    assert codes.tolist() == golden["out.codes_b"].tolist()
    assert mel.dtype == torch.float32
    assert torch.equal(mel, model.decode(codes))


def test_full_precision_switches_tf32_off_and_back():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert before[0] == "tf32", "PyTorch's default for convolutions, the reason for full_precision"
    with full_precision(torch.device("cpu")):
        inside = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert inside == ("ieee", "ieee")
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_released_sizes():
    with torch.device("meta"):
        tensors = DVAE(DVAEConfig()).state_dict()
    assert len(tensors) == 53
    assert sum(tensor.numel() for tensor in tensors.values()) == 59_963_984


def test_released_key_names():
    table = json.loads(reference_path("state_dict_keys/dvae.json").read_text())
    with torch.device("meta"):
        tensors = DVAE(DVAEConfig()).state_dict()
    found = {key: (list(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
    assert found == {key: (entry["shape"], "torch." + entry["dtype"]) for key, entry in table.items()}


def test_save_and_load_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = DVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert loaded.config.num_codes == model.config.num_codes


def test_fresh_weights_use_many_codes():
    torch.manual_seed(0)
    model = DVAE(DVAEConfig(hidden_size=32, codebook_dim=16, num_codes=64))
    codes = model.encode(torch.randn(4, 80, 200))
    assert codes.unique().numel() > 16
