"""The chain's models from the files they are published in."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
from chain_models import golden_file, golden_vocoder, make_tiny_chain, state_of
from hub_server import HubServer

from tortoise_hf.errors import UserError
from tortoise_hf.models import chain
from tortoise_hf.models.chain import PARTS, find_parts, load_part, part_config
from tortoise_hf.models.released import SPEAKING


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def released(folders, tmp_path, monkeypatch):
    """The tiny models as the released files: bare state dicts under the released names."""
    parts = {name: dataclasses.replace(part, config=part_config(name, folders / name)) for name, part in PARTS.items()}
    monkeypatch.setattr(chain, "PARTS", parts)
    folder = tmp_path / "released"
    folder.mkdir()
    for name, part in parts.items():
        state = load_part(name, folders / name).state_dict()
        torch.save({"model_g": state, "githash": "abc"} if name == "vocoder" else state, folder / part.file)
    return folder


def test_released_files_load_as_the_folders_do(folders, released):
    found = find_parts(PARTS, released)
    assert {name: path.name for name, path in found.items()} == {name: part.file for name, part in PARTS.items()}
    for name, path in found.items():
        model, expected = load_part(name, path), load_part(name, folders / name)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        state = expected.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert find_parts(["clvp"], folders) == {"clvp": folders / "clvp"}


def test_weight_normalised_vocoder_loads(tmp_path, monkeypatch):
    golden, _ = golden_vocoder()
    tensors, sizes = golden_file("univnet")
    weights = state_of(tensors)
    # As wide as transformers' kernel predictors, see `golden_vocoder`; the norm stays that of the 16 used channels.
    unused = golden.config.model_in_channels - sizes["noise_dim"]
    weights["conv_pre.weight_v"] = torch.nn.functional.pad(weights["conv_pre.weight_v"], (0, 0, 0, unused))
    torch.save({"model_g": weights}, tmp_path / "vocoder.pth")
    monkeypatch.setitem(PARTS, "vocoder", dataclasses.replace(PARTS["vocoder"], config=golden.config))
    model = load_part("vocoder", tmp_path / "vocoder.pth")
    for key, tensor in golden.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor)


def test_what_is_not_there_is_fetched_and_compared(tmp_path):
    content = {name: f"content of {name}".encode() for name in SPEAKING}
    with HubServer() as hub:
        for name, file in SPEAKING.items():
            # One file is gone from the first repository.
            origin = file.origins[1 if name == "vocoder.pth" else 0]
            hub.put(origin.repo_id, origin.path, content[name])
        found = find_parts(PARTS, cache_dir=tmp_path, endpoint=hub.url)
    for name, path in found.items():
        assert path.read_bytes() == content[PARTS[name].file]
        assert path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest()  # as the Hub recorded it


def test_damaged_and_wrong_files_are_named(folders, released):
    (released / "clvp2.pth").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"clvp2\.pth is damaged"):
        load_part("clvp", released / "clvp2.pth")
    torch.save({"some.weight": torch.zeros(3)}, released / "rlg_auto.pth")
    with pytest.raises(UserError, match=r"rlg_auto\.pth doesn't fit .* missing: layers\.0\.weight"):
        load_part("random_gpt", released / "rlg_auto.pth")
    (released / "clvp").mkdir()
    (released / "clvp" / "config.json").write_text("{")
    found = find_parts(["clvp"], released)
    with pytest.raises(UserError, match=r"config\.json can't be read"):
        load_part("clvp", found["clvp"])


def test_nowhere_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"clvp2\.pth[\s\S]*--weights_dir"):
        find_parts(["clvp"], tmp_path, cache_dir=tmp_path / "cache", endpoint="http://127.0.0.1:1")
