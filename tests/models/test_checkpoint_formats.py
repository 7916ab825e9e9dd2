"""Key tables, and reading the layouts people's autoregressive weights come in."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
import torch
from conftest import GOLDEN, reference_path
from safetensors.torch import load_file, save_file

from tortoise_hf.errors import UserError
from tortoise_hf.models.checkpoint_formats import (
    check_weights,
    config_from_weights,
    published_layout,
    published_state_dict,
    read_gpt_weights,
    read_tensors,
    write_published,
)
from tortoise_hf.models.dvae import DVAE, DVAEConfig
from tortoise_hf.models.gpt import GPTConfig, TortoiseGPT

PUBLISHED = GOLDEN / "100_gpt.pth"


def key_table(name):
    table = json.loads(reference_path(f"state_dict_keys/{name}.json").read_text())
    return {key: (tuple(entry["shape"]), getattr(torch, entry["dtype"])) for key, entry in table.items()}


def table_of(tensors):
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def config():
    return GPTConfig(
        num_layers=2, hidden_size=64, num_heads=4, num_mel_codes=256, max_text_tokens=40, max_mel_tokens=60
    )


@pytest.fixture(scope="module")
def weights():
    """The golden model's 54 tensors."""
    tensors = load_file(GOLDEN / "gpt.safetensors")
    return {key.removeprefix("sd."): tensor for key, tensor in tensors.items() if key.startswith("sd.")}


def assert_same(read, expected):
    assert list(read.keys() - expected.keys()) == []
    assert all(torch.equal(read[key].float(), tensor.float()) for key, tensor in expected.items())


# Key tables


@pytest.mark.parametrize(
    "name, attention_buffers", [("autoregressive", True), ("autoregressive_no_attn_buffers", False)]
)
def test_layout_is_the_published_one_in_its_order(name, attention_buffers):
    published = key_table(name)
    layout = published_layout(GPTConfig(), attention_buffers)
    assert layout == published
    assert list(layout) == list(published)
    assert len(layout) == (470 if attention_buffers else 410)


def test_full_size_model_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = TortoiseGPT(GPTConfig())
    assert table_of(model.state_dict()) == key_table("autoregressive_no_attn_buffers")
    assert sum(parameter.numel() for parameter in model.parameters()) == 421_526_786


def test_full_size_dvae_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    assert table_of(dvae.state_dict()) == key_table("dvae")


def test_golden_file_is_written_again_key_for_key(config, tmp_path):
    golden = read_tensors(PUBLISHED)
    assert table_of(golden) == published_layout(config)
    write_published(published_state_dict(read_gpt_weights(PUBLISHED), config), tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert type(again) is dict
    assert list(again) == list(golden)
    assert table_of(again) == table_of(golden)
    assert all(torch.equal(again[key], tensor) for key, tensor in golden.items())


def test_halves_keep_the_buffers_as_old_programs_know_them(config, weights):
    state_dict = published_state_dict(weights, config, torch.float16)
    assert table_of(state_dict) == published_layout(config, True, torch.float16)
    assert state_dict["gpt.h.0.attn.bias"].dtype == torch.uint8
    assert state_dict["gpt.h.0.attn.masked_bias"].item() == -10000
    assert state_dict["gpt.h.0.attn.c_attn.bias"].dtype == torch.float16


# Reading


def test_published_layout_is_read_without_its_buffers(weights):
    read = read_gpt_weights(PUBLISHED)
    assert len(read) == 78 - 2 * 2
    assert_same(read, weights)
    assert "gpt.h.0.attn.c_attn.bias" in read  # a careless pattern takes this one too


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_taken_off(weights, tmp_path, prefix):
    torch.save(
        {prefix + key: tensor for key, tensor in torch.load(PUBLISHED, weights_only=True).items()}, tmp_path / "p.pth"
    )
    assert_same(read_gpt_weights(tmp_path / "p.pth"), weights)


def test_names_of_regionally_compiled_blocks_are_read(weights, tmp_path):
    save_file(
        {key.replace("gpt.h.0.", "gpt.h.0._orig_mod."): tensor for key, tensor in weights.items()},
        tmp_path / "r.safetensors",
    )
    assert_same(read_gpt_weights(tmp_path / "r.safetensors"), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read(weights, tmp_path, dtype):
    torch.save({key: tensor.to(dtype) for key, tensor in weights.items()}, tmp_path / "half.pth")
    assert_same(read_gpt_weights(tmp_path / "half.pth"), {key: tensor.to(dtype) for key, tensor in weights.items()})


def test_old_pytorch_files_are_read(weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert_same(read_gpt_weights(tmp_path / "old.pth"), weights)


def test_cuda_storages_are_read_on_the_cpu(weights, tmp_path):
    """A file saved on a GPU says "cuda:0" in its pickle; it's made here by editing that word into a CPU file."""
    torch.save(weights, tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as source, zipfile.ZipFile(tmp_path / "cuda.pth", "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
                assert cpu in data
                data = data.replace(cpu, cuda)
            target.writestr(entry.filename, data)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "cuda.pth", weights_only=True)
    read = read_gpt_weights(tmp_path / "cuda.pth")
    assert {tensor.device.type for tensor in read.values()} == {"cpu"}
    assert_same(read, weights)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_wrapped_weights_are_found(weights, tmp_path, wrapper):
    torch.save({"epoch": 3, wrapper: weights}, tmp_path / "wrapped.pth")
    assert_same(read_gpt_weights(tmp_path / "wrapped.pth"), weights)


def test_duplicates_of_the_generation_wrapper_are_left_out(weights, tmp_path):
    saved = {**weights, "gpt.wte.weight": weights["mel_embedding.weight"]}
    saved |= {
        f"inference_model.transformer.{key.removeprefix('gpt.')}": weights[key]
        for key in weights
        if key.startswith("gpt.")
    }
    saved["inference_model.lm_head.1.weight"] = weights["mel_head.weight"]
    torch.save(saved, tmp_path / "late.pth")
    assert_same(read_gpt_weights(tmp_path / "late.pth"), weights)


# Refusing


class Harmful:
    def __reduce__(self):
        return (open, ("opened_by_pickle", "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Harmful()}, "code.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"holds Python objects besides tensors \(.*open\), which could run code"):
        read_tensors("code.pth")
    assert not (tmp_path / "opened_by_pickle").exists()


def test_plain_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"code\.pth is damaged, holds code, or is not a PyTorch file"):
        read_tensors(tmp_path / "code.pth")
    assert not (tmp_path / "opened_by_pickle").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file_is_refused(weights, tmp_path, suffix, share):
    whole = tmp_path / f"whole{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="cut"):
        read_tensors(cut)


@pytest.mark.parametrize("content", ["<html>Not found</html>", "version https://git-lfs.github.com/spec/v1"])
def test_text_in_the_place_of_weights_is_told_from_code(tmp_path, content):
    (tmp_path / "page.pth").write_text(content)
    with pytest.raises(UserError, match="web page") as error:
        read_tensors(tmp_path / "page.pth")
    assert "weights_only" not in str(error.value)


def test_numbered_tensors_are_refused(tmp_path):
    torch.save({0: torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "numbered.pth")
    with pytest.raises(UserError, match="aren't tensors with a name: 0;"):
        read_gpt_weights(tmp_path / "numbered.pth")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)])
def test_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected a table of weights"):
        read_tensors(tmp_path / "other.pth")


def test_training_state_is_told_from_weights(tmp_path):
    torch.save({"epoch": 1, "optimizers": [{"state": {}}], "schedulers": []}, tmp_path / "100.state")
    with pytest.raises(UserError, match="training state"):
        read_tensors(tmp_path / "100.state")


def test_name_that_occurs_twice_is_refused(weights, tmp_path):
    save_file({**weights, "module.final_norm.bias": weights["final_norm.bias"].clone()}, tmp_path / "twice.safetensors")
    with pytest.raises(UserError, match=r"final_norm\.bias twice"):
        read_gpt_weights(tmp_path / "twice.safetensors")


def test_every_kind_of_misfit_is_named(weights, config):
    layout = published_layout(config, attention_buffers=False)
    broken = dict(weights)
    del broken["final_norm.bias"]
    broken["mel_solo_embedding"] = torch.zeros(1, 1, 64)
    broken["text_head.weight"] = torch.zeros(300, 64)
    broken["text_head.bias"] = torch.zeros(256, dtype=torch.int64)
    with pytest.raises(UserError) as error:
        check_weights(broken, layout, "file.pth")
    message = str(error.value)
    assert "1 missing: final_norm.bias" in message
    assert "1 unexpected: mel_solo_embedding" in message
    assert "text_head.weight (300, 64) instead of (256, 64)" in message
    assert "text_head.bias (torch.int64, torch.strided)" in message


@pytest.mark.parametrize("change", [lambda tensor: tensor.to(torch.float8_e4m3fn), torch.Tensor.to_sparse])
def test_kinds_of_tensors_no_program_writes_are_refused(weights, config, change):
    broken = {**weights, "gpt.ln_f.bias": change(weights["gpt.ln_f.bias"])}
    with pytest.raises(UserError, match=r"1 not of 16 to 64 bits floating point: gpt\.ln_f\.bias"):
        check_weights(broken, published_layout(config, attention_buffers=False), "file.pth")


def test_values_that_are_not_finite_are_refused(weights, config):
    broken = {**weights, "gpt.ln_f.bias": torch.full((64,), torch.nan)}
    with pytest.raises(UserError, match=r"NaN or infinite values: gpt\.ln_f\.bias"):
        check_weights(broken, published_layout(config, attention_buffers=False), "file.pth")


# Sizes


def test_sizes_are_read_off_the_shapes():
    config = GPTConfig(num_layers=3, hidden_size=512, num_heads=8, num_text_tokens=300, max_mel_tokens=100)
    with torch.device("meta"):
        weights = TortoiseGPT(config).state_dict()
    found = config_from_weights(weights, "file.pth")
    assert published_layout(found) == published_layout(config)
    assert found.num_heads == 8


def test_sizes_of_a_narrow_model_are_not_guessed(weights):
    with pytest.raises(UserError, match=r"config\.json"):
        config_from_weights(weights, "file.pth")


def test_another_model_is_told_from_an_autoregressive_one():
    with pytest.raises(UserError, match="not an autoregressive model"):
        config_from_weights({"encoder.0.0.weight": torch.zeros(1)}, "dvae.pth")
