"""Bases: which files a run starts from, and the models built from them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden_gpt
from safetensors.torch import load_file, save_file

from tortoise_hf.config import ModelConfig
from tortoise_hf.errors import UserError
from tortoise_hf.models import released
from tortoise_hf.models.checkpoint_formats import published_state_dict, write_published
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT
from tortoise_hf.models.pretrained import (
    load_base_weights,
    load_dvae,
    load_gpt,
    load_mel_norms,
    load_tokenizer,
    load_trained,
    resolve_base,
)
from tortoise_hf.text import train_tokenizer

NORMS = -torch.linspace(2, 9, 80)
TEXTS = ["the thin thing then there", "when where what which", "sing song thing ring"] * 5


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base folder around the golden GPT."""
    folder = tmp_path_factory.mktemp("base")
    golden_gpt().save_pretrained(folder)
    train_tokenizer(TEXTS, 60).save(folder / "tokenizer.json")
    save_file({"mel_norms": NORMS}, folder / "mel_norms.safetensors")
    torch.manual_seed(0)
    DVAE(DVAEConfig(hidden_size=8, codebook_dim=8, num_codes=256, num_resnet_blocks=1)).save_pretrained(folder / "dvae")
    return folder


@pytest.fixture
def weights_dir(tmp_path, monkeypatch, base):
    """A folder with small stand-ins for the released files, and their hashes for the real ones."""
    folder = tmp_path / "weights"
    folder.mkdir()
    write_published(published_state_dict(golden_gpt().state_dict(), golden_gpt().config), folder / "autoregressive.pth")
    train_tokenizer(TEXTS[:3] * 4, 55).save(folder / "tokenizer.json")
    torch.save(NORMS * 2, folder / "mel_norms.pth")
    torch.save(load_file(base / "dvae" / "model.safetensors"), folder / "dvae.pth")
    monkeypatch.setattr(
        released,
        "RELEASED",
        {
            name: released.ReleasedFile(name, file.origins, file.sha256 and sha256(folder / name))
            for name, file in released.RELEASED.items()
        },
    )
    return folder


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def resolve(base, **settings):
    return resolve_base(ModelConfig(base=str(base), **settings), endpoint="http://127.0.0.1:1")


def assert_golden(model):
    expected = golden_gpt().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_complete_folder_needs_nothing_else(base):
    files = resolve(base)
    assert_golden(load_gpt(files))
    assert torch.equal(load_mel_norms(files), NORMS)
    assert load_tokenizer(files).vocab_size == 60
    dvae = load_dvae(files)
    assert dvae.config.hidden_size == 8
    assert not any(parameter.requires_grad for parameter in dvae.parameters())
    stored = load_file(base / "dvae" / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in dvae.state_dict().items())
    assert files.sha256("dvae_weights") == sha256(base / "dvae" / "model.safetensors")
    assert not files.dvae_is_released


def test_loaded_weights_do_not_alias_the_file(base, tmp_path):
    """Large files are mapped into memory; training must not write through to them, nor fail when they vanish."""
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    shutil.copyfile(GOLDEN / "100_gpt.pth", folder / "100_gpt.pth")
    before = sha256(folder / "100_gpt.pth")
    model = load_gpt(resolve(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert sha256(folder / "100_gpt.pth") == before


def test_golden_file_beside_a_config_is_a_base(base, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    shutil.copyfile(GOLDEN / "100_gpt.pth", folder / "100_gpt.pth")
    assert_golden(load_gpt(resolve(folder)))
    assert_golden(load_gpt(resolve(folder / "100_gpt.pth")))
    shutil.copyfile(GOLDEN / "100_gpt.pth", folder / "200_gpt.pth")
    with pytest.raises(UserError, match=r"100_gpt\.pth, 200_gpt\.pth"):
        resolve(folder)
    assert_golden(load_gpt(resolve(folder / "200_gpt.pth")))


def test_halves_become_float32(base, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(base, folder)
    half = {key: tensor.half() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    model = load_gpt(resolve(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.mel_head.weight, half["mel_head.weight"].float())


def test_what_a_folder_lacks_comes_from_the_release(base, weights_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the Hub's client waits between its attempts
    folder = tmp_path / "partial"
    shutil.copytree(base, folder)
    (folder / "mel_norms.safetensors").unlink()
    shutil.rmtree(folder / "dvae")
    with pytest.raises(UserError) as error:
        resolve(folder, weights_dir=str(tmp_path))
    assert "dvae.pth" in str(error.value)
    assert "mel_norms.pth" in str(error.value)
    assert "autoregressive.pth" not in str(error.value)
    files = resolve(folder, weights_dir=str(weights_dir))
    assert files.dvae_weights == weights_dir / "dvae.pth"
    assert torch.equal(load_mel_norms(files), NORMS * 2)
    assert load_tokenizer(files).vocab_size == 60
    assert "pinned" in files.origins["dvae_weights"]


def test_released_base_takes_everything_from_the_release(weights_dir):
    files = resolve("released", weights_dir=str(weights_dir))
    assert {path.parent for path in (files.gpt_weights, files.tokenizer, files.mel_norms, files.dvae_weights)} == {
        weights_dir
    }
    assert files.gpt_tokenizer == files.tokenizer
    assert files.gpt_config is None
    assert files.dvae_config is None
    with pytest.raises(UserError, match="64 wide"):  # the stand-in isn't of a released size
        load_gpt(files)


def test_folder_with_a_tokenizer_only_teaches_the_released_weights_its_vocabulary(base, weights_dir, tmp_path, caplog):
    folder = tmp_path / "words"
    folder.mkdir()
    tokenizer = train_tokenizer(["station nation ration motion notion potion"] * 9, 58)
    tokenizer.save(folder / "tokenizer.json")
    files = resolve(folder, weights_dir=str(weights_dir))
    assert files.gpt_tokenizer == weights_dir / "tokenizer.json"
    assert files.tokenizer == folder / "tokenizer.json"
    # The stand-ins' sizes can't be read off their weights, so they get their configs here.
    configs = {"gpt_config": base / "config.json", "dvae_config": base / "dvae" / "config.json"}
    files = type(files)(**{**vars(files), **configs})
    model = load_gpt(files)
    assert "tokens keep their rows" in caplog.text
    assert model.config.num_text_tokens == 255  # never smaller than before
    golden = golden_gpt().text_embedding.weight
    shared = tokenizer._tokenizer.get_vocab().keys() & load_tokenizer(files)._tokenizer.get_vocab().keys()
    assert "e" in shared
    old_id, new_id = (
        load_tokenizer(type(files)(**{**vars(files), "tokenizer": path}))._tokenizer.token_to_id("e")
        for path in (files.gpt_tokenizer, files.tokenizer)
    )
    assert torch.equal(model.text_embedding.weight[new_id], golden[old_id])
    assert torch.equal(model.text_embedding.weight[model.config.start_text_id], golden[255])


def test_more_text_ids_than_rows_are_refused(base, tmp_path):
    folder = tmp_path / "many"
    shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    for name in ("text_embedding.weight", "text_head.weight", "text_head.bias"):
        weights[name] = weights[name][:51].contiguous()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**values, "num_text_tokens": 50}))
    with pytest.raises(UserError, match="60 text ids"):
        load_gpt(resolve(folder))


def test_from_scratch_is_random_of_the_bases_size_and_repeatable(base, tmp_path):
    folder = tmp_path / "sizes"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="from_scratch"):
        resolve(folder)
    files = resolve(folder, from_scratch=True)
    assert files.gpt_weights is None
    torch.manual_seed(7)
    expected_draw = torch.rand(1)
    torch.manual_seed(7)
    model = load_gpt(files, from_scratch=True, seed=3)
    assert torch.equal(torch.rand(1), expected_draw)  # the global random state is the run's business
    assert model.config.num_layers == 2
    again, other = load_gpt(files, from_scratch=True, seed=3), load_gpt(files, from_scratch=True, seed=4)
    assert torch.equal(model.mel_head.weight, again.mel_head.weight)
    assert not torch.equal(model.mel_head.weight, other.mel_head.weight)
    assert not torch.equal(model.mel_head.weight, golden_gpt().mel_head.weight)
    with pytest.raises(UserError, match="random"):
        load_base_weights(files)


def test_from_scratch_ignores_weights_that_are_there(base):
    model = load_gpt(resolve(base, from_scratch=True), from_scratch=True, seed=0)
    assert not torch.equal(model.mel_head.weight, golden_gpt().mel_head.weight)


def test_from_scratch_has_rows_for_every_text_id(base, tmp_path):
    folder = tmp_path / "scratch"
    shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_text_tokens": 10}))
    model = load_gpt(resolve(folder, from_scratch=True), from_scratch=True)
    assert model.config.num_text_tokens == 60


@pytest.mark.parametrize("from_scratch", [False, True])
def test_dvae_with_other_codes_is_refused(base, tmp_path, from_scratch):
    """Its codes would be read as START and STOP, or lie behind the embedding."""
    folder = tmp_path / "codes"
    shutil.copytree(base, folder)
    DVAE(DVAEConfig(hidden_size=8, codebook_dim=8, num_codes=512, num_resnet_blocks=1)).save_pretrained(folder / "dvae")
    with pytest.raises(UserError, match="has 512 codes, but the model takes 256"):
        load_gpt(resolve(folder, from_scratch=from_scratch), from_scratch)


def test_places_may_begin_with_the_home_folder(base, weights_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(base / "tokenizer.json", tmp_path / "own.json")
    files = resolve("released", weights_dir="~/weights", tokenizer="~/own.json")
    assert files.tokenizer == tmp_path / "own.json"
    assert files.dvae_weights == weights_dir / "dvae.pth"


def test_own_weights_that_do_not_fill_the_model_are_refused(base, tmp_path):
    folder = tmp_path / "partial"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["gpt.h.1.attn.c_attn.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: gpt\.h\.1\.attn\.c_attn\.bias"):
        load_gpt(resolve(folder))


def test_dvae_that_does_not_fill_the_model_is_refused(base, tmp_path):
    folder = tmp_path / "dvae"
    shutil.copytree(base, folder)
    weights = load_file(folder / "dvae" / "model.safetensors")
    del weights["codebook.embed"]
    save_file(weights, folder / "dvae" / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: codebook\.embed"):
        load_dvae(resolve(folder))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "JSON"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "tortoise_gpt", "num_heads": 5}', "num_heads 5"),
        ('{"model_type": "tortoise_gpt", "num_heads": 0}', "num_heads is 0; expected whole numbers above 0"),
        ('{"model_type": "tortoise_gpt", "num_layers": "two"}', "num_layers is 'two'"),
    ],
)
def test_wrong_config_is_named(base, tmp_path, content, expected):
    folder = tmp_path / "config"
    shutil.copytree(base, folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        resolve(folder)


def test_base_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a file"):
        resolve(tmp_path / "nothing")


def test_full_size_file_is_recognised_without_a_config(tmp_path):
    """Shapes of the published file, on the meta device: no 1.7 GB is written."""
    from tortoise_hf.models.checkpoint_formats import config_from_weights

    with torch.device("meta"):
        weights = TortoiseGPT(GPTConfig()).state_dict()
    config = config_from_weights(weights, "autoregressive.pth")
    assert {key: getattr(config, key) for key in ("num_layers", "hidden_size", "num_heads", "num_text_tokens")} == {
        "num_layers": 30,
        "hidden_size": 1024,
        "num_heads": 16,
        "num_text_tokens": 255,
    }
    assert (config.text_positions, config.mel_positions) == (404, 608)


def test_a_checkpoint_of_compiled_blocks_is_read(tmp_path, base):
    model = golden_gpt()
    wrapped = {name.replace("gpt.h.", "gpt.h._orig_mod."): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=wrapped)
    found = load_trained(tmp_path, resolve_base(ModelConfig(base=str(base)))).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, base):
    """transformers would fill the gap with random ones and go on."""
    model = golden_gpt()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name != "gpt.h.0.attn.c_attn.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(UserError, match=r"1 missing: gpt\.h\.0\.attn\.c_attn\.weight"):
        load_trained(tmp_path, resolve_base(ModelConfig(base=str(base))))
